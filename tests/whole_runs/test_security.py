"""Nothing that a run reads is executed, and no secret that it is given is written down."""

import json
import os
import pickle
import shutil
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import jobs
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from saved_runs import ZERO_2, flags_for, signal_at, train
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from sft import merge_lora
from sft.flags import ModelArguments, TrainingArguments
from sft.job import UserError
from sft.model import lora, safe_loads
from sft.run import prepare
from sft.saving import checkpoint as whole_checkpoints
from sft.saving import export


class Malicious:
    """Whoever unpickles it runs its code, which leaves a file behind."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return exec, (f"open({str(self.mark)!r}, 'w').close()",)


@pytest.fixture
def mark(tmp_path):
    return tmp_path / "executed"


def test_the_malicious_pickle_is_one(mark):
    pickle.loads(pickle.dumps(Malicious(mark)))
    assert mark.exists()


def plant(file: Path, mark: Path, legacy: bool = False) -> None:
    """Put a torch file with malicious code in the place of another."""
    torch.save({"state": Malicious(mark)}, file, _use_new_zipfile_serialization=not legacy)


def list_again(folder: Path) -> None:
    """Write the manifest that goes with a checkpoint's files, as whoever changes them can."""
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["files"] = {
        name: {"bytes": (folder / name).stat().st_size, "sha256": whole_checkpoints.digest(folder / name)}
        for name in whole_checkpoints.files_in(folder)
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert whole_checkpoints.why_not_whole(folder) is None


# ---- checkpoints


@pytest.fixture
def resumable(whole_run, tiny_llama, questions_csv, tmp_path):
    """A copy of checkpoint-15, and the flags that continue from it."""
    checkpoint = tmp_path / "out" / "checkpoint-15"
    shutil.copytree(whole_run / "checkpoint-15", checkpoint)
    return checkpoint, flags_for(tiny_llama, questions_csv, tmp_path / "out", "--resume_from_checkpoint", "True")


@pytest.mark.parametrize("legacy", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt", "rng_state.pth"])
def test_a_state_that_runs_code_is_refused(resumable, mark, name, legacy):
    checkpoint, flags = resumable
    plant(checkpoint / name, mark, legacy)
    list_again(checkpoint)
    with pytest.raises(UserError, match=r"checkpoint-15: one of its files was not loaded, because it could run code"):
        train(*flags)
    assert not mark.exists()


def test_pickled_weights_that_run_code_are_refused_when_resuming(resumable, mark):
    checkpoint, flags = resumable
    (checkpoint / "model.safetensors").unlink()
    plant(checkpoint / "pytorch_model.bin", mark)
    list_again(checkpoint)
    with pytest.raises(UserError, match="because it could run code"):
        train(*flags)
    assert not mark.exists()


@pytest.mark.slow
def test_pickled_arguments_are_neither_read_nor_written(resumable, mark):
    checkpoint, flags = resumable
    assert not (checkpoint / "training_args.bin").exists()
    plant(checkpoint / "training_args.bin", mark)
    list_again(checkpoint)
    train(*flags)
    assert not mark.exists()
    assert not list(checkpoint.parent.glob("training_args.bin"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["optim_states.pt", "model_states.pt"])
def test_deepspeed_states_that_run_code_are_refused(tiny_llama, questions_csv, tmp_path, mark, name):
    (tmp_path / "ds.json").write_text(json.dumps(ZERO_2))
    flags = flags_for(tiny_llama, questions_csv, tmp_path / "out", "--deepspeed", str(tmp_path / "ds.json"))
    flags += ["--resume_from_checkpoint", "True", "--save_rehearsal", "False", "--max_steps"]
    jobs.run([*flags, "3", "--save_total_limit", "1"], 2, tmp_path / "log", only_checkpoints)
    checkpoint = tmp_path / "out" / "checkpoint-3"
    for state in checkpoint.glob(f"global_step*/*{name}"):
        plant(state, mark)
    list_again(checkpoint)
    printed = jobs.run([*flags, "6", "--resume_with_changes", "True"], 2, tmp_path / "log", expect=2)
    assert "because it could run code" in printed
    assert not mark.exists()


def only_checkpoints() -> None:
    """In a rank: end without an export, as a run that was killed before it."""
    prepare.Run._export = lambda *_: os._exit(0)


def test_sharded_metadata_that_runs_code_is_refused(tmp_path, mark):
    weights = {"weight": torch.ones(3, 2), "step": 7}
    folder = tmp_path / "checkpoint-3" / "pytorch_model_fsdp_0"
    dcp.save(weights, checkpoint_id=folder)
    with safe_loads.safe_loads(str(tmp_path / "checkpoint-3"), deepspeed=False):  # a sound one loads
        loaded = {"weight": torch.zeros(3, 2), "step": 0}
        dcp.load(loaded, checkpoint_id=folder)
    assert loaded["weight"].tolist() == [[1, 1]] * 3 and loaded["step"] == 7
    (folder / ".metadata").write_bytes(pickle.dumps(Malicious(mark)))
    with (
        pytest.raises(UserError, match=r"\.metadata is not a checkpoint's metadata .* builtins\.exec"),
        safe_loads.safe_loads(str(tmp_path / "checkpoint-3"), deepspeed=False),
    ):
        dcp.load(loaded, checkpoint_id=folder)
    assert not mark.exists()


def test_the_metadata_of_a_sharded_model_and_its_optimizer_is_read(tmp_path):
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4)).to(torch.bfloat16)
        fully_shard(model, mesh=mesh)
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.ones(2, 4, dtype=torch.bfloat16)).sum().backward()
        optimizer.step()
        for part, state in zip(("model", "optimizer"), get_state_dict(model, optimizer)):
            dcp.save({part: state}, checkpoint_id=str(tmp_path / "checkpoint-3" / part))
    finally:
        torch.distributed.destroy_process_group()
    assert len(list((tmp_path / "checkpoint-3").rglob(".metadata"))) == 2
    safe_loads.check_metadata(tmp_path / "checkpoint-3")


def test_sharded_values_that_run_code_are_refused(tmp_path, mark):
    dcp.save({"weight": torch.ones(3, 2), "step": Malicious(mark)}, checkpoint_id=tmp_path / "checkpoint-3")
    mark.unlink(missing_ok=True)  # saving plans with a copy of the object
    with (
        pytest.raises(UserError, match=r"could run code\. Unsupported global: GLOBAL exec"),
        safe_loads.safe_loads(str(tmp_path / "checkpoint-3"), deepspeed=False),
    ):
        dcp.load({"weight": torch.zeros(3, 2), "step": 0}, checkpoint_id=tmp_path / "checkpoint-3")
    assert not mark.exists()


# ---- models, adapters, tokenized rows


def test_a_model_of_pickled_weights_loads_only_when_it_holds_weights(tiny_llama, questions_csv, tmp_path, mark):
    from safetensors.torch import load_file

    model = shutil.copytree(tiny_llama, tmp_path / "model")
    torch.save(load_file(model / "model.safetensors"), model / "pytorch_model.bin")
    (model / "model.safetensors").unlink()
    train(*flags_for(model, questions_csv, tmp_path / "good", "--max_steps", "1"))
    assert (tmp_path / "good" / "COMPLETE.json").exists()
    plant(model / "pytorch_model.bin", mark)
    with pytest.raises(UserError, match="because it could run code"):
        train(*flags_for(model, questions_csv, tmp_path / "bad", "--max_steps", "1"))
    assert not mark.exists()


def test_code_of_a_model_repository_is_not_run(tiny_llama, questions_csv, tmp_path, mark):
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config |= {"model_type": "their_own", "auto_map": {"AutoConfig": "theirs.C", "AutoModelForCausalLM": "theirs.M"}}
    (model / "config.json").write_text(json.dumps(config))
    (model / "theirs.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    with pytest.raises(UserError, match="contains custom code"):
        train(*flags_for(model, questions_csv, tmp_path / "out", "--max_steps", "1"))
    assert not mark.exists()


@pytest.mark.slow
def test_an_adapter_of_pickled_weights_that_run_code_is_refused(tiny_llama, questions_csv, tmp_path, mark):
    pytest.importorskip("peft")
    train(*flags_for(tiny_llama, questions_csv, tmp_path / "adapter", "--max_steps", "2", "--use_lora", "True"))
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    plant(tmp_path / "adapter" / "adapter_model.bin", mark)
    with pytest.raises(UserError, match="adapter: one of its files was not loaded, because it could run code"):
        merge_lora.merge(str(tmp_path / "adapter"), str(tmp_path / "merged"))
    plant(tmp_path / "pytorch_model.bin", mark)
    with pytest.raises(Exception, match="Weights only load failed"):
        lora.record_base(tmp_path, ModelArguments(model_name_or_path=str(tmp_path)))
    assert not mark.exists()


@pytest.mark.slow
def test_tokenized_rows_that_run_code_are_not_loaded(tiny_llama, questions_csv, tmp_path, mark):
    flags = flags_for(tiny_llama, questions_csv, tmp_path / "out", "--max_steps", "1")
    flags += ["--data_cache_dir", str(tmp_path / "cache")]
    train(*flags)
    (entry,) = {file.parent for file in (tmp_path / "cache").rglob("lengths.npy")}
    np.save(entry / "lengths.npy", np.array([Malicious(mark)], dtype=object), allow_pickle=True)
    train(*flags, "--overwrite_output_dir", "True")  # built anew
    assert not mark.exists()


# ---- secrets

TOKEN, KEY = "hf_SecretOfTheHub123", "SecretOfTheTracker456"


@pytest.mark.slow
def test_no_secret_reaches_a_file_or_a_line(tiny_llama, questions_csv, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    command = flags_for(tiny_llama, questions_csv, tmp_path / "out", "--max_steps", "6", "--save_steps", "2")
    command += ["--hub_token", TOKEN, "--resume_from_checkpoint", "True"]
    monkeypatch.setattr("sys.argv", ["llama_training.py", *command])
    with monkeypatch.context() as patch:
        signal_at(patch, step=3)
        train(*command)  # stopped: it prints the command that continues
    trainer = train(*command)
    assert trainer.args.hub_token == TOKEN  # it is still there to upload with
    printed = "".join(capfd.readouterr())
    assert "To continue:" in printed and "--hub_token=***" in printed
    files = [file for file in (tmp_path / "out").rglob("*") if file.is_file()]
    assert {"run_report.json", "README.md", "COMPLETE.json", "optimizer.pt"} <= {file.name for file in files}
    for text in (TOKEN, KEY):
        assert text not in printed
        assert [str(file) for file in files if text.encode() in file.read_bytes()] == []


class FakeHub:
    """What a run would upload: for each upload its message, the names of the files, and whether one holds the token."""

    def __init__(self):
        self.uploads = []

    def create_repo(self, *_, **__):
        return SimpleNamespace(repo_id="me/model")

    def upload_folder(self, folder_path, commit_message, token, run_as_future=False, **_):
        assert token == TOKEN
        files = [file for file in Path(folder_path).rglob("*") if file.is_file()]
        leaks = [file.name for file in files if TOKEN.encode() in file.read_bytes()]
        self.uploads.append((commit_message, {file.name for file in files}, leaks))
        done = Future()
        done.set_result(None)
        return done


@pytest.mark.slow
def test_an_upload_holds_the_proved_model_and_no_token(tiny_llama, questions_csv, tmp_path, monkeypatch):
    hub = FakeHub()
    monkeypatch.setattr("transformers.trainer.hf_api", lambda: hub)
    monkeypatch.setattr(export, "HfApi", lambda: hub)
    monkeypatch.setattr("huggingface_hub.whoami", lambda token: {"name": "me"})
    train(
        *flags_for(tiny_llama, questions_csv, tmp_path / "out", "--max_steps", "3", "--push_to_hub", "True"),
        *("--hub_token", TOKEN, "--hub_model_id", "me/model"),
    )
    messages, names, leaks = zip(*hub.uploads)
    assert messages == ("Training in progress, step 3", "Model save")
    assert {"model.safetensors", "tokenizer.json", "README.md", "COMPLETE.json"} <= names[-1]
    assert leaks == ([], [])
    assert "training_args.bin" not in names[-1]
    assert not list((tmp_path / "out").rglob("training_args.bin"))


def test_a_pickle_of_the_arguments_holds_no_token(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), hub_token=TOKEN)
    assert TOKEN.encode() not in pickle.dumps(args)
    assert args.hub_token == TOKEN

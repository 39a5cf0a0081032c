"""An export is read back and proved, and every way in which it could be wrong is seen."""

import json
import math
import os
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from safetensors.torch import load_file, save_file
from saved_runs import flags_for, train
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sft.data.template import load_template
from sft.job import UserError
from sft.saving import checkpoint, export, rehearsal


def test_complete_json_says_what_was_proved(whole_run):
    complete = json.loads((whole_run / "COMPLETE.json").read_text())
    assert complete["step"] == 16
    assert complete["files"] == {"model.safetensors": checkpoint.describe_file(whole_run / "model.safetensors")}
    assert [line.split(" ")[0] for line in complete["proved"]] == ["21", "21", "the", "the", "tokenizer.model", "the"]


def test_a_model_is_on_the_disk_before_complete_json_claims_it(tmp_path, monkeypatch):
    for name in (
        "model.safetensors",
        "tokenizer.json",
        "adapter/adapter_model.safetensors",
        "checkpoint-3/optimizer.pt",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("of a run")
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def noted_fsync(handle) -> None:
        events.append(os.path.relpath(os.readlink(f"/proc/self/fd/{handle}"), tmp_path))
        fsync(handle)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "replace", lambda old, new: (events.append("COMPLETE.json"), replace(old, new)))
    export.complete(str(tmp_path), 3, [], {})
    written = [".", "adapter", "adapter/adapter_model.safetensors", "model.safetensors", "tokenizer.json"]
    assert sorted(events[:5]) == written and events[5:] == [".COMPLETE.json.new", "COMPLETE.json", "."]


def damaged(change):
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def set_value(name, value):
    return damaged(lambda tensors: tensors[name].__setitem__(0, value))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (damaged(lambda t: t.pop("model.norm.weight")), "model.norm.weight was not saved"),
        (damaged(lambda t: t.update(extra=torch.ones(1))), "extra was saved, which the model does not have"),
        (damaged(lambda t: t.update({"model.norm.weight": t["model.norm.weight"].bfloat16()})), "dtype is torch.bfloat16, not torch.float32"),
        (damaged(lambda t: t.update({"model.norm.weight": t["model.norm.weight"][:-1]})), r"shape is \[31\], not \[32\]"),
        (damaged(lambda t: t["model.norm.weight"].zero_()), "model.norm.weight is all zero"),
        (set_value("model.norm.weight", float("nan")), "model.norm.weight holds NaN or infinity"),
        (set_value("model.norm.weight", 7.0), "its bytes are not the trained weight's"),
    ],
)  # fmt: skip
def test_the_proof_sees_a_wrong_export(whole_run, tmp_path, damage, said):
    written = export.describe_weights(load_file(whole_run / "model.safetensors"))
    shutil.copy(whole_run / "model.safetensors", tmp_path)
    assert export.check_weights(tmp_path, written) == []
    damage(tmp_path)
    assert re.search(said, "; ".join(export.check_weights(tmp_path, written)))


def test_the_proof_sees_an_incomplete_index(tmp_path):
    weights = {"a": torch.ones(2), "b": torch.ones(3)}
    for name in weights:
        save_file({name: weights[name]}, tmp_path / f"{name}.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}))
    assert export.check_weights(tmp_path, export.describe_weights(weights)) == []
    index.write_text(json.dumps({"weight_map": {"a": "a.safetensors", "b": "a.safetensors"}}))
    problems = export.check_weights(tmp_path, export.describe_weights(weights))
    assert "the index and a.safetensors disagree about b" in problems
    (tmp_path / "b.safetensors").unlink()
    index.write_text(json.dumps({"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}))
    assert "b.safetensors is missing" in export.check_weights(tmp_path, export.describe_weights(weights))
    (tmp_path / "a.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-1])
    assert "a.safetensors is damaged: " in export.check_weights(tmp_path, export.describe_weights(weights))[0]


def test_tied_embeddings_are_proved_once(tmp_path):
    embedding, norm = torch.ones(4, 2), torch.ones(2)
    written = export.describe_weights({"embed": embedding, "head": embedding, "norm": norm})
    save_file({"head": embedding, "norm": norm}, tmp_path / "model.safetensors")
    assert export.check_weights(tmp_path, written) == []
    save_file({"norm": norm}, tmp_path / "model.safetensors")
    assert export.check_weights(tmp_path, written) == ["embed was not saved", "head was not saved"]


def test_the_proof_sees_another_models_logits(whole_run, tiny_llama):
    ids = torch.tensor([[1, 5, 9]])
    model = AutoModelForCausalLM.from_pretrained(whole_run)
    with torch.no_grad():
        logits = model(ids).logits
    assert export.check_logits(model, ids, logits, exact=True) == []
    other = AutoModelForCausalLM.from_pretrained(tiny_llama)
    for exact in (True, False):
        assert "logits differ from the trained model's by" in export.check_logits(other, ids, logits, exact)[0]
    nothing = torch.full_like(logits, float("nan"))
    assert export.check_logits(model, ids, nothing, exact=False) != []


def test_the_proof_sees_a_tokenizer_with_other_ids(whole_run):
    tokenizer, other = (AutoTokenizer.from_pretrained(whole_run) for _ in range(2))
    texts = ["What is 1 plus 2?"]
    assert export.check_tokenizer(tokenizer, tokenizer, texts, 320) == []
    other.add_tokens(["plus"])
    assert "other ids for 'What is 1 plus 2?'" in export.check_tokenizer(tokenizer, other, texts, 320)[0]
    assert "and the embedding 100 rows" in export.check_tokenizer(tokenizer, tokenizer, texts, 100)[0]
    largest = max(tokenizer(texts[0]).input_ids)
    said = [f"the tokenizer has id {largest} and the embedding {largest} rows"]
    assert export.check_tokenizer(tokenizer, tokenizer, texts, largest) == said
    assert export.check_tokenizer(tokenizer, tokenizer, texts, largest + 1) == []


def trainer_of(model: torch.nn.Module, should_save=True) -> SimpleNamespace:
    args = SimpleNamespace(should_save=should_save)
    return SimpleNamespace(model=model, args=args, is_deepspeed_enabled=False)


def test_gathered_weights_are_cast_copies_and_tied_weights_stay_tied():
    model = torch.nn.ModuleDict({name: torch.nn.Linear(2, 2, bias=False) for name in "abc"})
    model["b"].weight = model["a"].weight
    model.register_buffer("count", torch.tensor(3))
    weights = export.gather_weights(trainer_of(model), torch.bfloat16)
    assert list(weights) == ["count", "a.weight", "b.weight", "c.weight"]
    assert weights["a.weight"] is weights["b.weight"]
    assert weights["a.weight"] is not weights["c.weight"]
    assert (weights["a.weight"].dtype, weights["count"].dtype) == (torch.bfloat16, torch.int64)
    same_type = export.gather_weights(trainer_of(model), torch.float32)["c.weight"]
    assert same_type.data_ptr() != model["c"].weight.data_ptr()
    assert export.gather_weights(trainer_of(model, should_save=False), torch.bfloat16) == {}


def test_a_sample_is_the_first_weights_and_at_least_one():
    model = torch.nn.Sequential(*(torch.nn.Linear(4, 4, bias=False) for _ in range(3)))  # 16 weights each

    def names(up_to_bytes: float) -> list[str]:
        return list(export.gather_weights(trainer_of(model), torch.bfloat16, up_to_bytes))

    assert names(1) == ["0.weight"]
    assert names(63) == ["0.weight"]
    assert names(64) == ["0.weight", "1.weight"]
    assert names(1000) == ["0.weight", "1.weight", "2.weight"]


def test_an_adapter_is_what_is_trained_in_its_own_type():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[0].requires_grad_(False)
    weights = export.gather_weights(trainer_of(model), torch.bfloat16)
    assert {name: weight.dtype for name, weight in weights.items()} == {
        "1.weight": torch.float32,
        "1.bias": torch.float32,
    }


# ---- that each part of the proof is asked, and its answer counts


def give_the_tokenizer_a_word(exporter) -> None:
    exporter.trainer.processing_class.add_tokens(["plus"])


def train_on_another_answer(exporter) -> None:
    exporter.probe = exporter.probe[0], exporter.probe[1] + 1


def shrink_the_config(exporter) -> None:
    exporter.trainer.model.config.vocab_size -= 1


def spoil_the_merged_model(exporter) -> None:
    exporter.trained = exporter.folder / "adapter"
    exporter.trained.mkdir()
    shutil.copy(exporter.folder / "model.safetensors", exporter.trained)
    set_value("model.norm.weight", float("nan"))(exporter.folder)


@pytest.fixture
def exporter(whole_run, tmp_path, monkeypatch) -> export.Exporter:
    """Of a model that lies in tmp_path, written and not yet proved."""
    folder = shutil.copytree(whole_run, tmp_path / "out", ignore=shutil.ignore_patterns("checkpoint-*"))
    model, ids = AutoModelForCausalLM.from_pretrained(folder), torch.tensor([[1, 5, 9]])
    with torch.no_grad():
        logits = model(ids).logits
    monkeypatch.setattr(export, "probe_logits", lambda trainer: (ids, logits))
    args = SimpleNamespace(output_dir=str(folder), bf16=False, fp16=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids_of_rows = [torch.tensor(tokenizer(text)["input_ids"]) for text in ("1 plus 2", "3")]
    rows = [
        {"input_ids": torch.cat([ids, ids[-1:] * 0 + 2]), "labels": torch.cat([ids * 0 - 100, ids[-1:] * 0 + 2])}
        for ids in ids_of_rows
    ]
    trainer = SimpleNamespace(model=model, args=args, train_dataset=rows, processing_class=tokenizer)
    flags = SimpleNamespace(merge_lora=False, use_lora=False, load_in_4bit=False)
    made = export.Exporter(trainer, flags, torch.float32, load_template("none"))
    made.written = export.describe_weights(load_file(folder / "model.safetensors"))
    return made


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda exporter: set_value("model.norm.weight", 7.0)(exporter.folder), "its bytes are not the trained weight's"),
        (give_the_tokenizer_a_word, "the reloaded tokenizer gives other ids for '1 plus 2'"),
        (train_on_another_answer, "the reloaded model's logits differ"),
        (lambda exporter: (exporter.folder / "chat_template.jinja").write_text("Well"), "chat_template.jinja gives other ids than training"),
        (shrink_the_config, "the embedding has 320 rows, and the config 319"),
        (spoil_the_merged_model, "model.norm.weight holds NaN or infinity"),
    ],
)  # fmt: skip
def test_whatever_the_proof_finds_ends_the_run(exporter, spoil, said):
    spoil(exporter)
    with pytest.raises(UserError) as refused:
        exporter.prove()
    head, found = str(refused.value).splitlines()
    assert head == f"{exporter.folder}: the export is not complete; the checkpoints are untouched." and said in found


def test_a_small_model_is_run_and_a_large_one_is_not(exporter, monkeypatch):
    weights = 4 * sum(weight.numel() for weight in exporter.trainer.model.parameters())
    monkeypatch.setattr(export, "SMALL_BYTES", weights)
    assert "logits on 3 tokens" in exporter.prove()[-1]
    monkeypatch.setattr(export, "SMALL_BYTES", weights - 1)
    assert exporter.prove()[-1] == "tokenizer.model gives tokenizer.json's ids to 2 rows"


def test_what_is_written_ends_as_it_was_trained_and_can_be_read(exporter):
    trainer, (ids, _) = exporter.trainer, exporter.probe
    trainer.args.should_save, trainer.is_deepspeed_enabled = True, False
    trainer.model.generation_config.eos_token_id = [7, 2]  # as the base has it
    trainer.model.config.use_cache = False  # as in training
    (exporter.folder / "training_args.bin").write_text("")
    exporter.save()
    told = {
        name: json.loads((exporter.folder / f"{name}.json").read_text()) for name in ("config", "generation_config")
    }
    assert told["generation_config"]["eos_token_id"] == trainer.processing_class.eos_token_id == 2
    assert told["config"]["use_cache"] is True
    assert not (exporter.folder / "training_args.bin").exists()
    modes = {(exporter.folder / name).stat().st_mode for name in ("model.safetensors", "config.json")}
    assert len(modes) == 1, "who may read the config may read the weights"
    assert f"logits on {ids.numel()} tokens" in exporter.prove()[-1]


def test_logits_may_differ_by_rounding_alone():
    logits = torch.ones(1, 2, 8)

    def refused(difference: float, exact: bool) -> bool:
        class Model(torch.nn.Module):
            def forward(self, **_):
                return SimpleNamespace(logits=logits * (1 + difference))

        return bool(export.check_logits(Model(), torch.zeros(1, 2), logits, exact))

    assert [refused(difference, exact=True) for difference in (5e-5, 2e-4)] == [False, True]
    assert [refused(difference, exact=False) for difference in (4e-2, 6e-2)] == [False, True]


def test_of_a_large_model_every_nth_tensor_is_hashed_and_zeros_are_looked_at_in_all(tmp_path, monkeypatch):
    weights = {name: torch.full((4,), float(n)) for n, name in enumerate(("a", "b", "c", "d", "e"), start=1)}
    monkeypatch.setattr(export, "SMALL_BYTES", 40)  # of 80: every second one
    written = export.describe_weights(weights)
    assert [about["sha256"] is not None for about in written.values()] == [True, False, True, False, True]
    save_file(weights | {"b": torch.full((4,), 9.0)}, tmp_path / "model.safetensors")
    assert export.check_weights(tmp_path, written) == []
    save_file(weights | {"c": torch.full((4,), 9.0)}, tmp_path / "model.safetensors")
    assert export.check_weights(tmp_path, written) == ["c: its bytes are not the trained weight's"]
    save_file(weights | {"b": torch.zeros(4)}, tmp_path / "model.safetensors")
    assert export.check_weights(tmp_path, written) == ["b is all zero"]
    zeros = {"q.bias": torch.zeros(2), "q.lora_B.weight": torch.zeros(2)}  # as they begin
    save_file(zeros, tmp_path / "model.safetensors")
    assert export.check_weights(tmp_path, None) == []


def test_an_upload_leaves_out_checkpoints_and_what_is_unfinished(tmp_path, monkeypatch):
    uploaded = []

    def upload_folder(folder_path, ignore_patterns, **about):
        names = [path.relative_to(folder_path).as_posix() for path in Path(folder_path).rglob("*") if path.is_file()]
        uploaded.append((sorted(filter_repo_objects(names, ignore_patterns=ignore_patterns)), about))

    monkeypatch.setattr(export, "HfApi", lambda: SimpleNamespace(upload_folder=upload_folder))
    for name in ("model.safetensors", "checkpoint-3/optimizer.pt", "incomplete/checkpoint-6/a", ".run", "adapter/b"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    args = SimpleNamespace(output_dir=str(tmp_path), hub_revision="main", hub_token="hf_SECRET")
    for args.push_to_hub in (False, True):
        export.upload(SimpleNamespace(args=args, hub_model_id="me/model"))
    ((names, about),) = uploaded
    assert names == ["adapter/b", "model.safetensors"]
    assert (about["repo_id"], about["revision"], about["token"]) == ("me/model", "main", "hf_SECRET")


# ---- names that change, and ropes that grow


SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
EXPERTS = {"num_key_value_heads": 2, "num_experts_per_tok": 2}


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("mixtral", {"num_local_experts": 4} | EXPERTS),
        ("qwen3_moe", {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8} | EXPERTS),
        ("gpt_neox", {}),
        ("gpt2", {"n_embd": 32}),  # a tied head
    ],
)
def test_names_that_change_when_a_model_is_saved_are_found_again(kind, config, monkeypatch):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SMALL | config))
    assert export.check_names(model) == []
    monkeypatch.setattr(
        export, "revert_weight_conversion", lambda model, held: {f"old.{n}": w for n, w in held.items()}
    )
    assert "of the model's weights are not in the checkpoint" in export.check_names(model)[0]


@pytest.mark.parametrize("sample", [False, True])
def test_an_export_that_would_be_refused_is_refused_before_the_first_step(
    tiny_llama, questions_csv, tmp_path, monkeypatch, sample
):
    real = export.revert_weight_conversion
    monkeypatch.setattr(export, "revert_weight_conversion", lambda model, held: {f"old.{n}": w for n, w in real(model, held).items()})  # fmt: skip
    monkeypatch.setattr(rehearsal, "SMALL_BYTES", 0 if sample else rehearsal.SMALL_BYTES)
    with pytest.raises(UserError, match=r"trial save: the model would be refused at the end: .*was not saved"):
        train(*flags_for(tiny_llama, questions_csv, tmp_path / "out"))
    assert [path.name for path in (tmp_path / "out").iterdir() if path.is_dir()] == []


def test_a_rope_that_has_grown_with_the_rows_is_set_back_before_it_is_compared(tiny_llama, questions_csv, tmp_path):
    """Rows of up to 30 tokens, the first of which is shorter: its frequencies are another's after the training."""
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    path = folder / "config.json"
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    config = json.loads(path.read_text()) | {"max_position_embeddings": 8, "rope_parameters": rope}
    path.write_text(json.dumps(config))
    damaged(lambda tensors: [weight.mul_(8) for weight in tensors.values() if weight.dim() > 1])(
        folder
    )  # or none counts
    train(*flags_for(folder, questions_csv, tmp_path / "out", "--max_steps", "2"))
    assert "logits" in json.loads((tmp_path / "out" / "COMPLETE.json").read_text())["proved"][-1]


# ---- finished or not


def resumed(folder: Path, **flags) -> SimpleNamespace:
    flags = {"resume_from_checkpoint": "True", "overwrite_output_dir": False} | flags
    return SimpleNamespace(output_dir=str(folder), **flags)


@pytest.fixture
def finished(whole_run, tmp_path) -> Path:
    for name in ("model.safetensors", "COMPLETE.json"):
        shutil.copy(whole_run / name, tmp_path)
    return tmp_path


def test_a_finished_run_has_nothing_left_to_do(finished, capsys):
    assert export.is_already_finished(resumed(finished))
    assert "finished and proved model of step 16: nothing is left to do" in capsys.readouterr().out
    assert not export.is_already_finished(resumed(finished, resume_from_checkpoint=None))
    assert not export.is_already_finished(resumed(finished, overwrite_output_dir=True))


@pytest.mark.parametrize(
    ("asked", "steps"), [({"max_steps": 17}, 17), ({"max_steps": -1, "num_train_epochs": 20.5}, None)]
)
def test_a_finished_run_is_told_how_to_take_more_steps(whole_run, finished, asked, steps):
    shutil.copy(whole_run / "run_report.json", finished)
    had = json.loads((finished / "run_report.json").read_text())["batch"]
    again = resumed(finished, **{"max_steps": had["steps"], "num_train_epochs": 1.0})
    assert export.is_already_finished(again)
    begins = f"{finished} holds the finished model of a run of 16 steps, and this command asks for "
    begins += f"{steps or math.ceil(20.5 * had['steps_per_epoch'])}. "
    with pytest.raises(UserError) as refused:
        export.is_already_finished(resumed(finished, **{"num_train_epochs": 1.0} | asked))
    assert (
        str(refused.value) == f"{begins}Begin a new run with --model_name_or_path {finished} and another --output_dir."
    )
    (finished / "checkpoint-16").mkdir()
    with pytest.raises(UserError) as refused:
        export.is_already_finished(resumed(finished, **{"num_train_epochs": 1.0} | asked))
    cure = "To go on from checkpoint-16, add --overwrite_output_dir True --resume_with_changes True."
    assert str(refused.value) == begins + cure


def test_rank_0_decides_whether_a_run_is_finished(finished, monkeypatch):
    for found, done in (([False, True], False), ([True, False], True)):  # as where a disk is not the others' own
        monkeypatch.setattr(export, "gather", lambda mine, found=found: [mine] if mine is None else found)
        assert export.is_already_finished(resumed(finished)) is done


def flip_the_last_byte(folder: Path) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)


def write_complete(text: str):
    return lambda folder: (folder / "COMPLETE.json").write_text(text)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
        (flip_the_last_byte, "its bytes have changed"),
        (write_complete(""), "its COMPLETE.json is damaged"),
        (write_complete("[]"), "its COMPLETE.json is damaged"),
        (write_complete('{"step": 16}'), "its COMPLETE.json is damaged"),
        (write_complete('{"step": null, "files": {}}'), "its COMPLETE.json is damaged"),
        (write_complete('{"step": 16, "files": {"model.safetensors": 5}}'), "its COMPLETE.json is damaged"),
        (write_complete("[" * 100_000), "its COMPLETE.json is damaged"),
    ],
)
def test_a_finished_model_that_is_not_there_is_no_end(finished, capsys, damage, said):
    damage(finished)
    assert not export.is_already_finished(resumed(finished))
    printed = capsys.readouterr().out
    assert printed.startswith(f"warning: the finished model that {finished}/COMPLETE.json lists is not there: ")
    assert said in printed and printed.count("\n") == 1


def test_complete_json_of_an_earlier_version_is_checked_by_its_sizes(finished, capsys):
    size = (finished / "model.safetensors").stat().st_size
    write_complete(json.dumps({"step": 16, "proved": [], "bytes": {"model.safetensors": size}}))(finished)
    assert export.is_already_finished(resumed(finished))
    write_complete(json.dumps({"step": 16, "proved": [], "bytes": {"model.safetensors": size + 1}}))(finished)
    assert not export.is_already_finished(resumed(finished))


def test_an_upload_that_fails_leaves_a_complete_model_and_a_command(tmp_path, monkeypatch):
    def upload_folder(**_):
        raise ConnectionError("no route to the hub for hf_secret\nand more")

    monkeypatch.setattr(export, "HfApi", lambda: SimpleNamespace(upload_folder=upload_folder))
    args = SimpleNamespace(push_to_hub=True, hub_token="hf_secret", hub_revision=None, output_dir="out")
    with pytest.raises(UserError) as raised:
        export.upload(SimpleNamespace(args=args, hub_model_id="me/model"))
    assert raised.value.problems == [
        "the model in out is complete and proved, but was not uploaded (ConnectionError: no route to the hub for ***). "
        "Upload it with: hf upload me/model out"
    ]

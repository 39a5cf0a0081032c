"""Every JSON file and folder that a command reads, damaged: a sentence and exit code 2, or the fallback that is promised."""

import json
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from saved_runs import flags_for, train

from sft import generate, job, merge_lora
from sft.report import __main__ as report
from sft.saving import checkpoint


def filled_with(value):
    """Another value under each of a file's keys."""
    return lambda file: file.write_text(json.dumps(dict.fromkeys(json.loads(file.read_text()), value)))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda file: file.write_bytes(b""),
    "half": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    "a link to nowhere": lambda file: (file.unlink(), file.symlink_to(file.parent / "nowhere")),
    "a list": lambda file: file.write_text("[]"),
    "null": lambda file: file.write_text("null"),
    "a number": lambda file: file.write_text("7"),
    "no keys": lambda file: file.write_text("{}"),
    "deep": lambda file: file.write_text("[" * 100_000),
    "not UTF-8": lambda file: file.write_bytes(b'{"a": "\xff"}'),
    "numbers": filled_with(-1),
    "infinite": filled_with(1e400),
    "texts": filled_with("./x"),
    "lists": filled_with([None]),
}
ANY_FILE, TYPES = list(DAMAGES)[:4], list(DAMAGES)[-4:]
DICE = random.Random(4)


def some(*files: str, count: int = 5) -> list:
    """Pairs of a file and a damage: `count` for each file."""
    pairs = [
        (file, damage)
        for file in files
        for damage in DICE.sample(list(DAMAGES), count) * file.endswith(".json") or ANY_FILE
    ]
    return pytest.mark.parametrize(("file", "damage"), pairs)


@pytest.fixture
def ends_well(capsys, monkeypatch):
    """Runs a command, which may end in a sentence and exit code 2, and in no other error."""
    before = signal.getsignal(signal.SIGTERM)

    def run(command: Callable[[], object]) -> None:
        capsys.readouterr()
        try:
            with job.one_message_for_user_errors():
                command()
        except SystemExit as ended:
            printed = capsys.readouterr().err
            if ended.code:
                errors = [line for line in printed.splitlines() if line.startswith("error: ")]
                assert ended.code == 2 and len(errors) == 1 and "Traceback" not in printed, printed

    yield run
    signal.signal(signal.SIGTERM, before)


def copied(run: Path, to: Path) -> Path:
    """The exported model of a run, without its checkpoints."""
    to.mkdir()
    for file in run.iterdir():
        if file.is_file() and not file.name.startswith("."):
            shutil.copy(file, to)
    return to


MODEL = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors")


@pytest.mark.slow
@some(*MODEL)
def test_a_model(whole_run, questions_csv, tmp_path, ends_well, file, damage):
    model = copied(whole_run, tmp_path / "model")
    DAMAGES[damage](model / file)
    flags = flags_for(model, questions_csv, tmp_path / "out", "--max_steps", "1", "--save_strategy", "no")
    ends_well(lambda: train(*flags, "--save_rehearsal", "False"))
    ask = ["--model", str(model), "--instruction", "What?", "--max_new_tokens", "1"]
    ends_well(lambda: generate.main(ask))


STATES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth")


@pytest.mark.slow
@some("manifest.json", "trainer_state.json", "config.json", *STATES)
def test_a_checkpoint(two_checkpoints, tiny_llama, questions_csv, ends_well, file, damage):
    """Its manifest is written anew, so that sizes and hashes find nothing."""
    shutil.rmtree(two_checkpoints / "checkpoint-16")
    folder = two_checkpoints / "checkpoint-15"
    manifest = json.loads((folder / "manifest.json").read_text())
    DAMAGES[damage](folder / file)
    if file == "trainer_state.json" and damage in TYPES:
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | {"global_step": 15}))
    if file != "manifest.json":
        files = {name: checkpoint.describe_file(folder / name) for name in checkpoint.files_in(folder)}
        (folder / "manifest.json").write_text(json.dumps(manifest | {"files": files}))
    flags = flags_for(tiny_llama, questions_csv, two_checkpoints, "--save_rehearsal", "False")
    ends_well(lambda: train(*flags, "--resume_from_checkpoint", "True"))


@pytest.mark.slow
@some("run_report.json", "COMPLETE.json", ".run", ".run.lock", "incomplete", "scaler.pt", "model.safetensors")
def test_an_output_folder(whole_run, tiny_llama, questions_csv, tmp_path, ends_well, file, damage):
    output = copied(whole_run, tmp_path / "out")
    shutil.copytree(whole_run / "checkpoint-16", output / "checkpoint-16")
    if file not in ("COMPLETE.json", "model.safetensors"):  # else the run is over
        (output / "COMPLETE.json").unlink()
    if file == "scaler.pt":  # a stray one, which nothing lists
        file = "checkpoint-16/scaler.pt"
    if not (output / file).exists():
        (output / file).write_text("{}")
    DAMAGES[damage](output / file)
    ends_well(lambda: train(*flags_for(tiny_llama, questions_csv, output, "--resume_from_checkpoint", "True")))


@pytest.mark.slow
@some("meta.json", "tokens.bin", "lengths.npy", "note.json")
def test_tokenized_rows(tiny_llama, questions_csv, tmp_path, ends_well, file, damage):
    flags = flags_for(tiny_llama, questions_csv, tmp_path / "out", "--data_cache_dir", str(tmp_path / "cache"))
    flags += ["--check_data", "True"]
    ends_well(lambda: train(*flags))
    (entry,) = (folder for folder in (tmp_path / "cache").iterdir() if folder.is_dir())
    note = entry.with_suffix(".error")
    note.write_text('{"problems": []}')
    DAMAGES[damage](note if file == "note.json" else entry / file)
    ends_well(lambda: train(*flags))


@pytest.mark.slow
@some("deepspeed.json", "fsdp.json", "accelerator.json")
def test_a_flags_file(tiny_llama, questions_csv, tmp_path, ends_well, file, damage):
    (tmp_path / file).write_text('{"zero_optimization": {"stage": 2}}')
    DAMAGES[damage](tmp_path / file)
    flag = {"deepspeed.json": "--deepspeed", "fsdp.json": "--fsdp_config", "accelerator.json": "--accelerator_config"}
    flags = flags_for(tiny_llama, questions_csv, tmp_path / "out", "--max_steps", "1", "--save_strategy", "no")
    ends_well(lambda: train(*flags, flag[file], str(tmp_path / file)))


@pytest.mark.slow
@some("adapter_config.json", "base_model.json", "adapter_model.safetensors", count=8)
def test_an_adapter(watched_adapter, tmp_path, ends_well, file, damage):
    adapter = copied(watched_adapter.folder, tmp_path / "adapter")
    DAMAGES[damage](adapter / file)
    ends_well(lambda: merge_lora.merge(str(adapter), str(tmp_path / "merged")))
    ends_well(lambda: generate.main(["--model", str(adapter), "--instruction", "What?", "--max_new_tokens", "1"]))


@pytest.mark.slow
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_report(whole_run, tmp_path, ends_well, damage):
    shutil.copy(whole_run / "run_report.json", tmp_path)
    DAMAGES[damage](tmp_path / "run_report.json")
    ends_well(lambda: report.load_runs([str(tmp_path)]) and report.main([str(tmp_path), "--output", "no.txt"]))

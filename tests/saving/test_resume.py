"""What a continued run must share with the one that it continues: each part of it, alone."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import LlamaConfig

from sft.flags import parse
from sft.job import UserError
from sft.saving import resume


class Rows:
    """Two examples, [5, 6] and [7, 8, 9], each with a prompt of one token."""

    def __init__(self, **changes):
        values = {"tokens": [5, 6, 7, 8, 9], "offsets": [0, 2], "lengths": [2, 3], "prompt_lengths": [1, 1]}
        values |= {"switches": [3, 4]}
        arrays = {name: np.array(value) for name, value in (values | changes).items()}
        rows = SimpleNamespace(tokens=arrays.pop("tokens"), switches=arrays.pop("switches"))
        self.parts = [SimpleNamespace(rows=rows)]
        vars(self).update(arrays)

    def __len__(self) -> int:
        return len(self.lengths)


def identity(rows: Rows, *flags: str, **config) -> dict[str, str]:
    required = ["--model_name_or_path", "m", "--data_path", "d.csv", "--output_dir", "o", "--use_cpu", "True"]
    model_args, data_args, args = parse([*required, *flags])
    model = LlamaConfig(**{"hidden_size": 32, "num_attention_heads": 4} | config)
    return resume.run_identity(args, model_args, data_args, rows, model, "DDP", "{instruction}", "digest")


@pytest.mark.parametrize(
    "change",
    [
        {"tokens": [5, 6, 7, 8, 4]},
        {"offsets": [0, 1]},
        {"lengths": [3, 2]},
        {"prompt_lengths": [1, 2]},
        {"switches": [3, 3]},
    ],
)
def test_other_rows_are_other_data(change):
    before, now = identity(Rows()), identity(Rows(**change))
    assert [name for name in before if before[name] != now[name]] == ["data"]
    assert before == identity(Rows())


@pytest.mark.parametrize(
    ("flags", "config", "changed"),
    [
        ("--data_seed 5", {}, ["seed"]),
        ("--adam_epsilon 1e-6", {}, ["optimizer"]),
        ("--warmup_steps 3", {}, ["schedule"]),
        ("--max_steps 7", {}, ["schedule"]),
        ("--bf16 True", {}, ["precision"]),
        ("--max_grad_norm 0.5", {}, ["max_grad_norm"]),
        ("--gradient_accumulation_steps 2", {}, ["examples_per_step", "micro_batch"]),
        ("", {"intermediate_size": 77}, ["model"]),
        ("", {"use_cache": False}, []),
    ],
)
def test_each_setting_changes_its_own_part(flags, config, changed):
    before, now = identity(Rows()), identity(Rows(), *flags.split(), **config)
    assert sorted(name for name in before.keys() | now.keys() if before.get(name) != now.get(name)) == changed


@pytest.mark.parametrize("go_on", [False, True])
def test_deepspeeds_checkpoints_are_read_by_the_same_stage_on_as_many_ranks(go_on):
    saved = {"engine": "DeepSpeed ZeRO 2", "world_size": "2", "examples_per_step": "16"}
    for change, said in (
        (
            {"world_size": "4"},
            "saved by 2 ranks, and this run has 4: DeepSpeed ZeRO 2 reads a checkpoint on the same number alone",
        ),
        (
            {"engine": "DeepSpeed ZeRO 3"},
            "saved by DeepSpeed ZeRO 2, and this run is DeepSpeed ZeRO 3, which cannot read it",
        ),
    ):
        with pytest.raises(UserError) as refused:
            resume.refuse_changes("out/checkpoint-3", saved, saved | change, go_on=go_on)
        (problem,) = refused.value.problems
        assert problem == f"out/checkpoint-3 was {said}. Start this run as that one was started."


@pytest.mark.parametrize("wanted", ["True", "checkpoint-3"])
def test_a_checkpoint_that_one_machine_does_not_see_is_not_called_damaged(tmp_path, monkeypatch, wanted):
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    elsewhere = {True: ("rank 1 on b", False)}
    monkeypatch.setattr(resume, "gather", lambda value: [value, elsewhere.get(isinstance(value, tuple), value)])
    flags = {"resume_from_checkpoint": "True" if wanted == "True" else str(folder), "output_dir": str(tmp_path)}
    with pytest.raises(UserError) as refused:
        resume.choose_checkpoint(SimpleNamespace(**flags))
    assert refused.value.problems == [
        f"{folder}: it is there for other ranks, but not for rank 1 on b. Put it on a disk that all machines share."
    ]
    assert folder.is_dir()


def test_a_measured_budget_is_kept_while_every_row_fits_in_it(capsys):
    def kept(longest: int, number="60", **given) -> int | None:
        args = SimpleNamespace(**{"packing": True, "tokens_per_micro_batch": None, "world_size": 2} | given)
        resume.keep_token_budget("checkpoint-3", {"tokens_per_micro_batch": number, "world_size": "2"}, args, longest)
        return args.tokens_per_micro_batch

    assert [kept(59), kept(60), kept(61)] == [60, 60, None]
    assert (kept(5, number="-"), kept(5, packing=False), kept(5, tokens_per_micro_batch=9)) == (None, None, 9)
    assert kept(5, world_size=4) is None  # other memory is left
    assert capsys.readouterr().out == "--tokens_per_micro_batch auto: 60, as in checkpoint-3\n" * 2


def test_a_folder_that_rank_0_tries_and_removes_meanwhile_is_none(tmp_path, monkeypatch):
    def gone(folder):
        raise FileNotFoundError(2, "No such file or directory", str(folder))

    monkeypatch.setattr(resume, "newest_first", gone)
    flags = {"output_dir": str(tmp_path / "out"), "check_data": False, "overwrite_output_dir": False, "do_train": True}
    assert resume.output_dir_problems(SimpleNamespace(**flags, resume_from_checkpoint=None)) == []


def test_whatever_fails_while_a_checkpoint_is_loaded_is_one_sentence():
    def _load_rng_state(error: Exception):
        raise error

    def training_step(error: Exception):
        raise error

    def fails(step, error, checkpoint="out/checkpoint-3"):
        with pytest.raises(Exception) as found, resume.loading(checkpoint):
            step(error)
        return str(found.value) if isinstance(found.value, UserError) else found.type

    assert fails(_load_rng_state, RuntimeError("no central directory\nmore")) == (
        "out/checkpoint-3: its files are those that its manifest.json lists, but cannot be loaded: RuntimeError: no central directory. "
        "Remove it: the run then continues from an older one, or from the beginning."
    )
    assert fails(_load_rng_state, UserError("it could run code")) == "it could run code"
    assert fails(_load_rng_state, torch.OutOfMemoryError()) is torch.OutOfMemoryError
    assert fails(_load_rng_state, KeyError("x"), checkpoint=None) is KeyError
    assert fails(training_step, KeyError("x")) is KeyError

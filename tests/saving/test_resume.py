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


# ---- what a continued run keeps, and what it may change


@pytest.mark.parametrize(
    ("packing", "asked", "before", "packs"),
    [
        (True, False, {"packing": "False"}, False),
        (True, True, {"packing": "False"}, True),  # then the settings are compared, and the run is refused
        (True, False, {"packing": "True"}, True),
        (True, False, {}, True),
        (False, True, {"packing": "False"}, False),
    ],
)
def test_a_padded_run_goes_on_padded(capsys, packing, asked, before, packs):
    args = SimpleNamespace(packing=packing, packing_asked=asked)
    resume.keep_padding("out/checkpoint-3", before, args)
    assert args.packing is packs
    assert capsys.readouterr().out == "packing: off, as in out/checkpoint-3\n" * (packing and not packs)


@pytest.mark.parametrize(
    ("asked", "whole", "kept"),
    [
        ("SHARDED_STATE_DICT", True, "FULL_STATE_DICT"),
        ("FULL_STATE_DICT", False, "SHARDED_STATE_DICT"),
        ("SHARDED_STATE_DICT", False, "SHARDED_STATE_DICT"),
    ],
)
def test_a_checkpoint_of_fsdp_keeps_its_layout(tmp_path, capsys, asked, whole, kept):
    if whole:
        (tmp_path / "pytorch_model_fsdp.bin").touch()
    args = SimpleNamespace(fsdp_plugin_args={"state_dict_type": asked})
    resume.keep_layout(None, args)
    assert args.fsdp_plugin_args == {"state_dict_type": asked}
    resume.keep_layout(str(tmp_path), args)
    assert args.fsdp_plugin_args == {"state_dict_type": kept}
    how = "rank 0 gathers and writes everything" if whole else "each rank writes its own part"
    assert capsys.readouterr().out.startswith(f"resume: {how}" if asked != kept else "")
    resume.keep_layout(str(tmp_path), SimpleNamespace(fsdp_plugin_args=None))


SAVED = {"world_size": "4", "engine": "FSDP", "examples_per_step": "16", "micro_batch": "2 x 2"}
SAVED |= {"tokens_per_micro_batch": "128", "seed": "3"}


@pytest.mark.parametrize("go_on", [False, True])
def test_other_ranks_go_on_where_each_step_keeps_its_examples(capsys, go_on):
    alone = {"world_size": "1", "micro_batch": "2 x 8", "tokens_per_micro_batch": "96"}
    left = resume.on_another_number_of_ranks("out/checkpoint-3", SAVED, SAVED | alone, go_on)
    assert left == SAVED | alone  # a budget is of the memory that so many ranks leave
    assert (
        "out/checkpoint-3 was saved by 4 ranks, and this run has 1. Each optimizer step keeps"
        in capsys.readouterr().out
    )
    assert resume.on_another_number_of_ranks("out/checkpoint-3", SAVED, SAVED | {"seed": "4"}, go_on) == SAVED
    zero = {"engine": "DeepSpeed ZeRO 2"}
    assert resume.on_another_number_of_ranks("c", SAVED | zero, SAVED | zero | alone, go_on) == SAVED | zero
    assert resume.on_another_number_of_ranks("c", {"seed": "3"}, SAVED, go_on) == {"seed": "3"}  # of an earlier version


def test_other_ranks_with_other_examples_in_a_step_are_told_the_sizes_that_keep_them():
    for ranks, examples, cure in (
        ("2", "8", "--per_device_train_batch_size x --gradient_accumulation_steps must be 8"),
        ("3", "12", "16 cannot be divided by 3: start another number of ranks"),
    ):
        now = SAVED | {"world_size": ranks, "examples_per_step": examples}
        with pytest.raises(UserError) as refused:
            resume.on_another_number_of_ranks("out/checkpoint-3", SAVED, now, go_on=False)
        assert str(refused.value) == (
            f"out/checkpoint-3 was saved by 4 ranks, and this run has {ranks}. Each optimizer step must keep its 16 examples "
            f"(it has {examples}): {cure}."
        )
        assert resume.on_another_number_of_ranks("out/checkpoint-3", SAVED, now, go_on=True) == SAVED


EVALUATES = "--eval_strategy steps --eval_split 0.1 --eval_steps"


@pytest.mark.parametrize(
    ("flags", "judged"),
    [
        ("", False),
        ("--early_stopping_patience 2", True),
        ("--load_best_model_at_end True --save_strategy best", True),
        ("--lr_scheduler_type reduce_lr_on_plateau", True),
    ],
)
def test_evaluations_count_where_they_decide_something(flags, judged):
    before, now = (identity(Rows(), *f"{EVALUATES} {steps} {flags}".split()) for steps in (3, 4))
    assert [name for name in before if before[name] != now.get(name)] == ["evaluation"] * judged
    assert not any("eval_" in name for name in before)


def test_an_adapter_and_an_engines_file_are_known_by_what_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(resume.lora, "weights_digest", lambda *_: "0123456789abcdef")
    whole, adapter = identity(Rows()), identity(Rows(), "--use_lora", "True")
    four_bits = identity(Rows(), "--use_lora", "True", "--load_in_4bit", "True")
    assert (whole["base_weights"], adapter["base_weights"]) == ("in the checkpoint", "0123456789ab")
    assert (
        whole["adapter"] == "no" and '"lora_r": ' in adapter["adapter"] and adapter["adapter"] != four_bits["adapter"]
    )

    real, file = resume.run_identity, tmp_path / "ds.json"

    def with_engine(**engine) -> dict[str, str]:
        def run_identity(args, *others):
            vars(args).update(engine)
            return real(args, *others)

        monkeypatch.setattr(resume, "run_identity", run_identity)
        return identity(Rows())

    file.write_text('{"zero_optimization": {"stage": 2}}')
    stage_2, moved = with_engine(deepspeed=str(file)), file.rename(tmp_path / "same.json")
    assert with_engine(deepspeed=str(moved)) == stage_2  # its name does not matter, and what it says does
    moved.write_text('{"zero_optimization": {"stage": 3}}')
    assert with_engine(deepspeed=str(moved)) != stage_2
    here = {"state_dict_type": "FULL_STATE_DICT", "hybrid_shard": True, "reshard_after_forward": True}
    assert with_engine(deepspeed=None, fsdp_config=here)["--fsdp_config"] == '{"reshard_after_forward": true}'

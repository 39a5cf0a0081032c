"""The arithmetic of a run: examples, steps, number types."""

from types import SimpleNamespace

import pytest
import torch

from sft.arithmetic import Arithmetic, Precision
from sft.job import UserError


def args(**given) -> SimpleNamespace:
    """8 examples to a step: 2 ranks x 2 per device x 2 accumulation."""
    asked = {"world_size": 2, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    asked |= {"num_train_epochs": 2.0, "max_steps": -1, "dataloader_drop_last": False}
    asked |= {"packing": True, "train_sampling_strategy": "random"}
    asked |= {"bf16": False, "fp16": False, "save_dtype": None, "deepspeed": None, "fsdp": None}
    return SimpleNamespace(**(asked | given))


def steps(examples: int, **given) -> tuple[int, int]:
    arithmetic = Arithmetic.of(args(**given), examples)
    assert arithmetic.examples_per_step == 8
    return arithmetic.steps_per_epoch, arithmetic.steps


def test_steps_are_rounded_up_and_max_steps_wins():
    assert steps(64) == (8, 16)
    assert steps(65) == (9, 18)
    assert steps(65, num_train_epochs=0.5) == (9, 5)
    assert steps(65, max_steps=3) == (9, 3)
    assert steps(3) == (1, 2)


def test_drop_last_leaves_out_the_step_that_is_not_full():
    assert steps(65, dataloader_drop_last=True) == (8, 16)
    assert steps(71, dataloader_drop_last=True) == (8, 16)
    assert steps(72, dataloader_drop_last=True) == (9, 18)
    # the stock sampler leaves out a micro-batch: 4 examples on the two ranks, half a step
    stock = {"packing": False, "train_sampling_strategy": "group_by_length", "dataloader_drop_last": True}
    assert steps(69, **stock) == (9, 18)
    assert steps(67, **stock) == (8, 16)
    assert steps(69, **stock | {"train_sampling_strategy": "random"}) == (8, 16), "the sampler is ours, padded too"


def test_too_few_rows_for_one_step_are_one_sentence():
    with pytest.raises(UserError) as raised:
        steps(7, dataloader_drop_last=True)
    assert str(raised.value) == (
        "--dataloader_drop_last True drops all 7 examples: an optimizer step takes 8 (2 ranks x 2 per device x 2 "
        "accumulation). Remove the flag, or make the step smaller."
    )


def test_the_lines_that_a_user_checks_first():
    assert Arithmetic.of(args(), 1065).lines(1065, "cpu") == (
        "2 CPU processes x 2 per device x 2 accumulation = 8 examples per optimizer step\n"
        "1,065 examples: 134 optimizer steps per epoch, 268 in this run"
    )
    assert Arithmetic.of(args(world_size=1), 8).lines(8, "cuda").startswith("1 GPU x 2 per device")


def precision(use_lora: bool = False, load_in_4bit: bool = False, **given) -> Precision:
    return Precision.of(SimpleNamespace(use_lora=use_lora, load_in_4bit=load_in_4bit), args(**given))


def test_number_types():
    assert precision().record() == dict.fromkeys(("weights", "gradients", "optimizer", "compute", "export"), "float32")
    assert (precision(bf16=True).compute, precision(bf16=True).export) == (torch.bfloat16, torch.bfloat16)
    assert precision(bf16=True, save_dtype="float16").record()["export"] == "float16"
    assert precision(use_lora=True, fp16=True).record()["frozen"] == "float16"
    assert precision(use_lora=True, load_in_4bit=True).record()["frozen"] == "4 bits (nf4)"


def test_number_types_in_one_line():
    assert str(precision(bf16=True)) == (
        "precision: float32 weights, gradients and optimizer state, bfloat16 compute, exported as bfloat16"
    )
    assert "gradients (added up between GPUs in bfloat16) and" in str(precision(bf16=True, fsdp=True))
    assert "added up" not in str(precision(bf16=True, fsdp=True, world_size=1)) + str(precision(fsdp=True))
    zero = SimpleNamespace(get_value=lambda name: None)
    line = str(precision(bf16=True, deepspeed="ds.json", hf_deepspeed_config=zero))
    assert "optimizer state, gradients summed in bfloat16" in line
    assert str(precision(use_lora=True, bf16=True)).startswith(
        "precision: frozen weights in bfloat16; trained additions: float32 weights"
    )

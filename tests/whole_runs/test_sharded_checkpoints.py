"""Checkpoints of runs that FSDP2 shards: each rank's part once, and a run that goes on with another number of ranks."""

import json
import os
import shutil
import signal

import fsdp_over_gloo
import jobs
import pytest
import torch
from accelerate.utils import merge_fsdp_weights
from safetensors.torch import load_file
from saved_runs import flags_for, losses, same_weights
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from sft.run.trainer import SupervisedTrainer

WHAT = ("pytorch_model_fsdp_0", "optimizer_0")
ALWAYS = ["--use_cpu", "True", "--resume_from_checkpoint", "True"]


def shard_and_stop() -> None:
    """In a rank: shard on the CPU, and send rank 0 SIGUSR1 in step STOP_AT."""
    fsdp_over_gloo.prepare_rank()
    real = SupervisedTrainer.training_step

    def training_step(self, model, inputs, num_items_in_batch=None):
        at = int(os.environ.get("STOP_AT", "0"))
        if os.environ["RANK"] == "0" and self.state.global_step + 1 == at and not self.message.micro_batches:
            os.kill(os.getpid(), signal.SIGUSR1)
        return real(self, model, inputs, num_items_in_batch)

    SupervisedTrainer.training_step = training_step


class Started:
    """Runs of 16 steps of 8 examples, two in a micro-batch of the padded run, on as many ranks as are asked for."""

    def __init__(self, model, csv, folder):
        self.model, self.csv, self.folder = model, csv, folder

    def __call__(
        self, name: str, ranks: int, *more: str, expect=0, how="full_shard auto_wrap", **environment: str
    ) -> str:
        flags = flags_for(self.model, self.csv, self.folder / name, *ALWAYS, "--fsdp", how)
        flags += ["--gradient_accumulation_steps", str(4 // ranks), "--save_steps", "6", *more]
        log = self.folder / f"{name}-{len([*self.folder.glob(f'{name}-*.log')])}.log"
        return jobs.run(flags, ranks, log, shard_and_stop, expect, WORLD_SIZE=str(ranks), **environment)


@pytest.fixture(scope="module")
def start(tiny_llama, questions_csv, tmp_path_factory) -> Started:
    return Started(tiny_llama, questions_csv, tmp_path_factory.mktemp("sharded"))


@pytest.fixture(scope="module")
def whole(start):
    """The run that nothing stops, on two ranks."""
    start("whole", 2)
    return start.folder / "whole"


def parts_of(folder) -> dict[str, list[int]]:
    """The numbers in each part of each tensor."""
    kept = FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {name: tensor for name, tensor in kept.items() if isinstance(tensor, TensorStorageMetadata)}
    parts = {name: [chunk.sizes.numel() for chunk in tensor.chunks] for name, tensor in tensors.items()}
    return {name: sizes for name, sizes in parts.items() if not name.endswith(".step")}


@pytest.mark.slow
def test_a_checkpoint_holds_each_weight_once_and_each_ranks_part(whole, tmp_path):
    checkpoint = whole / "checkpoint-12"
    parts = {f"{what}/__{rank}_0.distcp" for what in WHAT for rank in (0, 1)}
    held = {
        file.relative_to(checkpoint).as_posix(): file.stat().st_size for file in checkpoint.rglob("*") if file.is_file()
    }
    assert {name for name in held if name.endswith(("distcp", "safetensors", "bin"))} == parts
    weights = sum(weight.numel() for weight in load_file(whole / "model.safetensors").values())
    found = {what: sum(sum(parts) for parts in parts_of(checkpoint / what).values()) for what in WHAT}
    assert found == {"pytorch_model_fsdp_0": weights, "optimizer_0": 2 * weights}
    merge_fsdp_weights(str(checkpoint / "pytorch_model_fsdp_0"), str(tmp_path))  # as docs/output.md says
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(whole / "model.safetensors").keys()


@pytest.mark.slow
def test_two_ranks_continue_bit_for_bit(start, whole):
    assert "stopped at step 5 of 16" in start("stopped", 2, STOP_AT="5")
    start("stopped", 2)
    assert losses(start.folder / "stopped") == losses(whole)
    assert same_weights(start.folder / "stopped", whole)


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["True", "False"])
def test_a_run_goes_on_with_another_number_of_ranks(start, whole, packing):
    """1 -> 2 -> 1 ranks: the examples of each step, the losses and the weights are those of a run that stayed."""
    more = ["--packing", packing]
    name = f"moved-{packing}"
    assert "stopped at step 5 of 16" in start(name, 1, *more, STOP_AT="5")
    printed = start(name, 2, *more, STOP_AT="11")
    assert (
        f"resume: {start.folder / name / 'checkpoint-5'} was saved by 1 rank, and this run has 2. Each optimizer step keeps its 8 "
        "examples. Losses differ in the last digits, and random numbers (dropout) are drawn anew, from --seed and the step."
    ) in printed
    start(name, 1, *more)
    moved, stayed = losses(start.folder / name), losses(whole)
    assert len(moved) == 16
    for step, reference in zip(moved, stayed, strict=True):
        assert step == pytest.approx(reference, rel=2e-5)
    weights, reference = (load_file(folder / "model.safetensors") for folder in (start.folder / name, whole))
    for key, weight in weights.items():
        torch.testing.assert_close(weight, reference[key], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_hybrid_shard_shards_inside_a_machine_and_copies_between_two(start, whole):
    printed = start("hybrid", 4, how="hybrid_shard auto_wrap", LOCAL_WORLD_SIZE="2", STOP_AT="5")
    assert "--fsdp hybrid_shard: each of 2 machines holds the whole model, sharded among its 2 ranks" in printed
    parts = parts_of(start.folder / "hybrid" / "checkpoint-5" / "pytorch_model_fsdp_0")
    assert {len(sizes) for sizes in parts.values()} == {2}, "halves, each once"
    printed = start("hybrid", 2)  # and goes on as full_shard
    assert "checkpoint-5 was saved by 4 ranks, and this run has 2." in printed
    for step, reference in zip(losses(start.folder / "hybrid"), losses(whole), strict=True):
        assert step == pytest.approx(reference, rel=2e-5)


@pytest.mark.slow
def test_steps_of_other_examples_are_refused_in_a_sentence(start, whole):
    output = start.folder / "refused"
    shutil.copytree(whole / "checkpoint-12", output / "checkpoint-12")
    printed = start("refused", 1, "--gradient_accumulation_steps", "2", expect=2)
    assert printed.count("error:") == 1
    assert (
        f"{output / 'checkpoint-12'} was saved by 2 ranks, and this run has 1. Each optimizer step must keep its 8 examples (it has 4): "
        "--per_device_train_batch_size x --gradient_accumulation_steps must be 8."
    ) in printed


@pytest.mark.slow
def test_a_checkpoint_that_rank_0_wrote_whole_is_continued_as_it_was(start, whole):
    """As these scripts saved until December 2026: the model twice, once in a file of FSDP's, once as model.safetensors."""
    asked = ["--fsdp_config", json.dumps({"state_dict_type": "FULL_STATE_DICT"})]
    start("old", 2, *asked, STOP_AT="5")
    shutil.copytree(start.folder / "old", start.folder / "old-alone")
    assert (start.folder / "old" / "checkpoint-5" / "pytorch_model_fsdp.bin").is_file()
    printed = start("old", 2)
    assert "resume: rank 0 gathers and writes everything of this run's checkpoints, as it was for " in printed
    assert losses(start.folder / "old") == losses(whole)
    assert same_weights(start.folder / "old", whole)
    start("old-alone", 1)  # and on another number of ranks
    for step, reference in zip(losses(start.folder / "old-alone"), losses(whole), strict=True):
        assert step == pytest.approx(reference, rel=2e-5)

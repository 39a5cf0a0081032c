"""Saving, tried before the first step: what would fail after days of training fails in the first minute, with the reason.

The real model goes through the real saving code into a scratch folder, on all ranks, and the disk is compared with everything
that the run will keep.
"""

import math
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from sft.job import UserError, all_ranks_or_none, rank, say

SMALL_BYTES = 4 * 2**30  # a checkpoint up to this size is rehearsed whole, a larger one by a sample


SAMPLE_BYTES = 256 * 2**20


SCRATCH = "incomplete/rehearsal"  # what is incomplete is cleared away when a run begins


Weights = dict[str, torch.Tensor]


class Rehearsal(TrainerCallback):
    """Rehearses when the model is wrapped and sharded as in training, before the first step.

    Args:
        trainer: with a `before_writing` that sees the weights which are about to be written.
        export_dtype: the type of the exported weights.
        add_seconds: told what was done ("rehearsal") and how long it took.
    """

    def __init__(self, trainer, export_dtype: torch.dtype, add_seconds: Callable[[str, float], None]):
        self.trainer, self.export_dtype, self.add_seconds = trainer, export_dtype, add_seconds

    def on_train_begin(self, args, state, control, **kwargs):
        began = time.perf_counter()
        what = rehearse(self.trainer, self.export_dtype)
        seconds = time.perf_counter() - began
        self.add_seconds("rehearsal", seconds)
        say(f"save rehearsal: {what}, {seconds:.1f} s")


def rehearse(trainer, export_dtype: torch.dtype) -> str:
    """Save once before the first step, on all ranks, and remove what was written.

    A small model goes through all of it, optimizer included. Of a large one every weight is gathered and the first few are
    written, which takes the same collectives and little of the disk.

    Returns: how much was rehearsed.

    Raises:
        UserError: when the disk cannot hold what the run will keep, or no weights were written.
    """
    output_dir = Path(trainer.args.output_dir)
    checkpoint = checkpoint_bytes(trainer)
    with all_ranks_or_none():
        say(check_space(output_dir, checkpoint, checkpoints_kept(trainer), model_bytes(trainer, export_dtype)))
    scratch, small = output_dir / SCRATCH, checkpoint <= SMALL_BYTES
    was_empty = trainer.is_fsdp_enabled and not trainer.optimizer.state
    with _saving_to(trainer, scratch, small):
        trainer._save_checkpoint(trainer.model_wrapped, None)
        with _in_one_piece(trainer):
            trainer.save_model()
        if dist.is_initialized():
            dist.barrier()
        written = any(scratch.glob("*.safetensors"))
    if was_empty:
        trainer.optimizer.state.clear()  # torch filled it in with a step of its own, to be able to save it (2.13)
    if dist.is_initialized():
        dist.barrier()
    if rank() == 0:
        shutil.rmtree(scratch.parent, ignore_errors=True)
    if not written:
        raise UserError(
            "save rehearsal: no model.safetensors was written, so this run would end without a model. With DeepSpeed stage 3 set "
            '"stage3_gather_16bit_weights_on_model_save": true.'
        )
    return "whole" if small else "a sample"


@contextmanager
def _saving_to(trainer, scratch: Path, small: bool) -> Iterator[None]:
    """The Trainer saves to `scratch`: everything, or weights alone and only the first of them."""
    args = trainer.args
    kept = {name: getattr(args, name) for name in ("output_dir", "save_only_model", "save_total_limit", "push_to_hub")}
    args.output_dir, args.save_total_limit, args.push_to_hub = str(scratch), None, False
    if not small:
        args.save_only_model, trainer.before_writing = True, first_tensors
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(args, name, value)
        trainer.before_writing = None


@contextmanager
def _in_one_piece(trainer) -> Iterator[None]:
    """FSDP gathers the whole model, as for the export, also when its checkpoints are sharded."""
    if not trainer.is_fsdp_enabled:
        yield
        return
    plugin = trainer.accelerator.state.fsdp_plugin
    kind = plugin.state_dict_type.name
    plugin.set_state_dict_type("FULL_STATE_DICT")
    try:
        yield
    finally:
        plugin.set_state_dict_type(kind)


def first_tensors(state_dict: Weights, up_to_bytes: int = SAMPLE_BYTES) -> Weights:
    """The first weights of a model up to a size, at least one."""
    some: Weights = {}
    for name, tensor in state_dict.items():
        up_to_bytes -= tensor.nbytes
        if some and up_to_bytes < 0:
            break
        some[name] = tensor
    return some


def _numels(trainer) -> tuple[int, int]:
    """Parameters of the whole model, and the trainable ones (ZeRO 3 keeps the whole size in `ds_numel`)."""
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in trainer.model.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained)


def model_bytes(trainer, export_dtype: torch.dtype) -> int:
    """Size of the exported model, or of a LoRA adapter, which stays float32."""
    total, trained = _numels(trainer)
    return total * export_dtype.itemsize if trained == total else 4 * trained


def checkpoint_bytes(trainer) -> int:
    """Size of one checkpoint: float32 weights and two AdamW moments; under DeepSpeed its own layout; adapters alone for LoRA."""
    total, trained = _numels(trainer)
    saved = trained if trained < total else total
    if trainer.args.save_only_model:
        return 4 * saved
    if (
        trainer.is_deepspeed_enabled
    ):  # the Trainer's copy and DeepSpeed's in the compute type; float32 master and moments
        return 2 * saved * trainer.model.dtype.itemsize + 12 * trained
    full = trainer.is_fsdp_enabled and "FULL" in str(trainer.accelerator.state.fsdp_plugin.state_dict_type)
    return (8 if full else 4) * saved + 8 * trained


def checkpoints_kept(trainer) -> int:
    """How many checkpoints lie on the disk at the worst moment: a new one is whole before an old one goes."""
    args, steps = trainer.args, trainer.state.max_steps
    strategy = args.save_strategy.value
    by_steps = math.ceil(steps / max(1, trainer.state.save_steps or 1))
    made = {"steps": by_steps, "epoch": math.ceil(args.num_train_epochs)}.get(strategy, 1)
    made = max(1, made)  # a stop saves one, whatever the strategy
    return min(made, args.save_total_limit + 1) if args.save_total_limit else made


def gb(size: int) -> str:
    """1234567890 -> "1.23 GB", 1234567 -> "0.0012 GB"."""
    return f"{size / 1e9:.2f} GB" if size > 1e8 else f"{size / 1e9:.2g} GB"


def check_space(output_dir: Path, checkpoint: int, kept: int, model: int) -> str:
    """Say the sum of what a run will keep; raise when the disk has less."""
    there = next(folder for folder in (output_dir, *output_dir.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(there).free
    mine = sum(f.stat().st_size for old in output_dir.glob("checkpoint-*") for f in old.rglob("*") if f.is_file())
    needed = kept * checkpoint + model
    line = (
        f"disk: {kept} checkpoint{'s' * (kept != 1)} x {gb(checkpoint)} + model {gb(model)} = {gb(needed)}; "
        f"{gb(free)} free in {there}" + (f", {gb(mine)} in its checkpoints" if mine else "")
    )
    if needed > free + mine:
        raise UserError(
            f"{line}. The run would fail when the disk is full. Keep fewer checkpoints (--save_total_limit 1, larger --save_steps) "
            "or use another --output_dir."
        )
    return line

"""Try saving before the first step: what would fail after days of training fails in the first minute, with the reason.

The real model goes through the real saving code into a scratch folder, with the proof that will judge the export, and the disk is
compared with all that the run will keep.
"""

import math
import shutil
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch

from sft.data.template import Template
from sft.flags import ModelArguments
from sft.job import UserError, all_ranks_or_none, rank, say, swapped
from sft.model import loading
from sft.saving.checkpoint import INCOMPLETE, files_in, newest_first, save_whole
from sft.saving.export import Exporter, count_weights

SMALL_BYTES = 4 * 2**30  # a checkpoint up to this size is rehearsed whole, a larger one by a sample
SAMPLE_BYTES = 256 * 2**20
SCRATCH = f"{INCOMPLETE}/rehearsal"  # what is incomplete is cleared away when a run begins


def rehearse(trainer, model_args: ModelArguments, export_dtype: torch.dtype, template: Template) -> str:
    """Save once before the first step, on all ranks, and remove what was written; the Trainer's state stays as it was.

    A small model goes through all of it, optimizer included. Of a large one the first weights are gathered, cast and written,
    and the names of all are proved. An adapter is not merged.

    Returns: how much was rehearsed.

    Raises:
        UserError: the export would be refused.
    """
    args, checkpoint, output_dir = trainer.args, checkpoint_bytes(trainer), Path(trainer.args.output_dir)
    kept = checkpoints_kept(args, trainer.state.max_steps, trainer.state.save_steps or 1)
    with all_ranks_or_none():
        say(check_space(output_dir, checkpoint, kept, model_bytes(trainer, export_dtype)))
    scratch, small = output_dir / SCRATCH, checkpoint <= SMALL_BYTES
    folder = f"checkpoint-{trainer.state.global_step}"

    model_args = replace(model_args, merge_lora=False)

    def export() -> None:
        exporter.folder = exporter.trained = Path(args.output_dir, folder)
        exporter.save()

    state = deepcopy(vars(trainer.state))
    was_empty = trainer.is_fsdp_enabled and not trainer.optimizer.state
    with swapped(args, output_dir=str(scratch), push_to_hub=False):
        if small:
            trainer._save_checkpoint(trainer.model_wrapped, None)
        # its forward pass comes after the checkpoint: ZeRO-3 (0.19.8) cannot save weights that it fetches for a backward pass
        exporter = Exporter(trainer, model_args, export_dtype, template, math.inf if small else SAMPLE_BYTES)
        with swapped(args, save_only_model=True), swapped(trainer.model.config, use_cache=False):
            save_whole(trainer, {}, export)
    # saving notes, for one, which checkpoint is the best: there is none in the scratch folder
    vars(trainer.state).clear()
    vars(trainer.state).update(state)
    if was_empty:
        trainer.optimizer.state.clear()  # torch filled it in with a step of its own, to be able to save it (2.13)
    exporter.folder = exporter.trained = scratch / folder
    with all_ranks_or_none(), loading.whole_models(args):
        if rank() == 0:
            problems = ["trial save: no model.safetensors was written, so this run would end without a model."]
            if any(exporter.folder.glob("*.safetensors")):
                refused, _ = exporter.check()
                problems = [f"trial save: the model would be refused at the end: {problem}" for problem in refused]
            shutil.rmtree(scratch.parent, ignore_errors=True)
            if problems:
                raise UserError(problems)
    return "complete" if small else "a sample"


def model_bytes(trainer, export_dtype: torch.dtype) -> int:
    """Size of the exported model, or of a LoRA adapter, which stays float32."""
    total, trained = count_weights(trainer.model)
    return total * export_dtype.itemsize if trained == total else 4 * trained


def checkpoint_bytes(trainer) -> int:
    """Size of one checkpoint: what is trained, in float32, and two AdamW moments; under DeepSpeed its own layout."""
    each = 12
    if trainer.is_deepspeed_enabled:  # in the compute type next to the float32 master, and as a model where it is one
        each += (1 + trainer.checkpoints_are_models) * trainer.model.dtype.itemsize
    elif trainer.is_fsdp_enabled and "FULL" in str(trainer.accelerator.state.fsdp_plugin.state_dict_type):
        each = 16
    return (4 if trainer.args.save_only_model else each) * count_weights(trainer.model)[1]


def checkpoints_kept(args, steps: int, save_steps: float) -> int:
    """How many checkpoints lie on the disk at the worst moment: a new one is whole before an old one goes."""
    every = save_steps if save_steps >= 1 else math.ceil(steps * save_steps)
    by_steps = math.ceil(steps / max(1, every))
    made = max(1, {"steps": by_steps, "epoch": math.ceil(args.num_train_epochs)}.get(args.save_strategy.value, 1))
    if args.save_strategy.value == "no":
        made = 0  # a stop saves one where there is room, and prints it where there is none
    return min(made, args.save_total_limit + 1) if args.save_total_limit else made


def refuse_full_disk(args, weights: int, steps: int, export_dtype: torch.dtype) -> None:
    """Refuse, before a weight is loaded, a run of all weights that the disk has no room for; an engine's checkpoints may take more."""
    kept, each = checkpoints_kept(args, steps, args.save_steps), 4 if args.save_only_model else 12
    check_space(Path(args.output_dir), each * weights, kept, export_dtype.itemsize * weights)


def gb(size: int) -> str:
    """1234567890 -> "1.23 GB", 1234567 -> "0.0012 GB"."""
    return f"{size / 1e9:{'.2f' if size > 1e8 else '.2g'}} GB"


def check_space(output_dir: Path, checkpoint: int, kept: int, model: int) -> str:
    """Return the sum of what a run will keep, in a sentence; raise when the disk has less."""
    there = next(folder for folder in (output_dir, *output_dir.absolute().parents) if folder.is_dir())
    free = shutil.disk_usage(there).free
    mine = sum(sum(files_in(old).values()) for old in newest_first(output_dir))
    needed = kept * checkpoint + model
    checkpoints = f"{kept} checkpoint{'s' * (kept != 1)} x {gb(checkpoint)} + "
    line = f"disk: {checkpoints * (kept > 0)}model {gb(model)}{f' = {gb(needed)}' * (kept > 0)}; "
    line += f"{gb(free)} free in {there}" + (f", {gb(mine)} in its checkpoints" if mine else "")
    if needed > free + mine:
        cure = "Keep fewer checkpoints (--save_total_limit 1, larger --save_steps) or use another --output_dir."
        raise UserError(f"{line}. The run would fail when the disk is full. {cure}")
    return line

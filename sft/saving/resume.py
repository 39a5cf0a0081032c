"""Exact resume: which checkpoint continues, and whether this run is the one that it belongs to.

A checkpoint's manifest holds the settings that a resumed run must share. None of them holds text of the data.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy

from sft.job import UserError, rank, say
from sft.saving.checkpoint import INCOMPLETE, MANIFEST, gather, newest_first, step_of, why_not_whole


def choose_checkpoint(training_args) -> str | None:
    """The checkpoint that `--resume_from_checkpoint True | PATH` continues from; None starts at step 0.

    True takes the newest whole one and names every one that it had to skip. With none at all it starts at the beginning,
    which is what the first start under `torchrun --max_restarts` needs. All ranks call it together.
    """
    wanted, output_dir = training_args.resume_from_checkpoint, Path(training_args.output_dir)
    if rank() == 0:
        shutil.rmtree(output_dir / INCOMPLETE, ignore_errors=True)
    candidates = gather(newest_first(output_dir))[0]
    if str(wanted or False).lower() == "false":
        if rank() == 0:
            for folder in candidates:  # there are some only after --overwrite_output_dir True
                shutil.rmtree(folder)
        return None
    if str(wanted).lower() != "true":
        folder = Path(os.path.normpath(wanted))
        if step_of(folder) < 0:
            raise UserError(
                f"--resume_from_checkpoint {wanted}: no such checkpoint folder. {_what_exists(candidates, output_dir)}"
            )
        problem = why_not_whole(folder)
        if problem:
            raise UserError(f"--resume_from_checkpoint {folder}: {problem}. {_what_exists(candidates, output_dir)}")
        newer = [c.name for c in candidates if step_of(c) > step_of(folder)]
        if newer:
            raise UserError(
                f"--resume_from_checkpoint {folder}: {output_dir} also holds {', '.join(newer)}, which this run would mix with its own. "
                "Move them away, or resume with True."
            )
        say(f"resume: {folder}")
        return str(folder)
    problems: list[str] = []
    for folder in candidates:
        problem = why_not_whole(folder)
        if problem is None:
            for line in problems:
                say(f"warning: {line}. Using {folder.name} instead.")
            say(f"resume: {folder}")
            return str(folder)
        problems.append(f"{folder.name} is not whole: {problem}")
    if problems:
        raise UserError([f"{output_dir}/{line}. Remove it to start from the beginning." for line in problems])
    say(f"resume: {output_dir} holds no checkpoint yet: starting from the beginning")
    return None


def _what_exists(candidates: list[Path], output_dir: Path) -> str:
    names = ", ".join(folder.name for folder in candidates)
    return (
        f"{output_dir} holds {names}; True takes the newest whole one."
        if names
        else f"{output_dir} holds no checkpoint."
    )


def output_dir_problems(flags) -> list[str]:
    """Why a run must not write into its output_dir; empty when it may."""
    if not flags.output_dir or flags.check_data:
        return []
    output_dir = Path(flags.output_dir)
    there = next(folder for folder in (output_dir.absolute(), *output_dir.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        return [f"{output_dir}: {there} is not a folder that can be written to. Name another --output_dir."]
    resumes = str(flags.resume_from_checkpoint or False).lower() != "false"
    if flags.overwrite_output_dir or resumes:
        return []
    if any(output_dir.glob("*.safetensors")):
        return [
            f"{output_dir}: it holds a finished model. Name another --output_dir, or give --overwrite_output_dir True."
        ]
    old = newest_first(output_dir)
    return (
        [
            f"{output_dir}: it holds {old[0].name} of an earlier run. Continue that with --resume_from_checkpoint True, name another "
            "--output_dir, or start again with --overwrite_output_dir True, which removes its checkpoints."
        ]
        if old
        else []
    )


def saved_identity(checkpoint: str) -> dict[str, str]:
    """What kind of run wrote a checkpoint, as `save_whole` was told."""
    return json.loads((Path(checkpoint) / MANIFEST).read_text("utf-8"))["run"]


# What a run is, as far as a continued run must be the same; and what a difference does to it.
EFFECT_OF_CHANGE = {
    "data": "the remaining steps train on other rows than the first ones did, and rows can be seen twice or never",
    "prompt_template": "the model is taught two different prompts",
    "tokenizer": "the same text becomes other tokens than the model was trained on so far",
    "model_max_length": "rows are cut at another length",
    "model": "the saved weights and optimizer states belong to another model",
    "lora": "the saved adapter has other shapes or other layers",
    "world_size": "examples meet other ranks, random states are missing, and a sharded optimizer may not load at all",
    "engine": "the optimizer's state is stored in another layout and may not load at all",
    "examples_per_step": "optimizer steps hold other examples, the position in the data moves, and the schedule has another length",
    "micro_batch": "the same examples are summed in another order: losses differ in the last digits",
    "packing": "the same examples are summed in another order: losses differ in the last digits",
    "tokens_per_micro_batch": "the same examples are summed in another order: losses differ in the last digits",
    "share_prefixes": "the same tokens are computed in other rows: losses differ in the last digits",
    "seed": "the remaining steps draw their examples from another permutation: rows can be seen twice or never",
    "schedule": "the learning rate jumps: its curve depends on the total number of steps",
    "learning_rate": "none: the checkpoint's scheduler keeps its own peak (begin anew from the checkpoint's weights instead)",
    "optimizer": "none: the checkpoint's optimizer keeps its own settings (begin anew from the checkpoint's weights instead)",
    "max_grad_norm": "gradients are clipped at another norm",
    "precision": "steps are computed in another number format",
}


def run_identity(trainer, model_args, template: str, tokenizer_digest: str) -> dict[str, str]:
    """What a continued run must share with the one that it continues: a readable value for each key of EFFECT_OF_CHANGE."""
    args, dataset, config = trainer.args, trainer.train_dataset, trainer.model.config.to_diff_dict()
    tokens = hashlib.sha256(dataset.rows.tokens.data)
    for numbers in (dataset.offsets, dataset.lengths, dataset.prompt_lengths):
        tokens.update(numpy.ascontiguousarray(numbers).data)
    for name in ("transformers_version", "_name_or_path", "dtype", "use_cache", "pad_token_id"):
        config.pop(name, None)

    def short(text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    stage = trainer.accelerator.state.deepspeed_plugin.zero_stage if trainer.is_deepspeed_enabled else None
    per_device, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    lora = {
        name: value
        for name, value in vars(model_args).items()
        if name.startswith(("lora_", "use_lora", "load_in_4bit"))
    }
    return {
        "data": f"{len(dataset):,} examples, {int(dataset.lengths.sum()):,} tokens, {tokens.hexdigest()[:12]}",
        "prompt_template": short(template),
        "tokenizer": short(tokenizer_digest),
        "model_max_length": str(args.model_max_length),
        "model": f"{config.get('model_type')} {short(json.dumps(config, sort_keys=True, default=str))}",
        "lora": json.dumps(lora) if model_args.use_lora else "no",
        "world_size": str(args.world_size),
        "engine": f"DeepSpeed ZeRO {stage}" if stage is not None else "FSDP" if trainer.is_fsdp_enabled else "DDP",
        "examples_per_step": str(args.world_size * per_device * accumulation),
        "micro_batch": f"{per_device} per device x {accumulation}",
        "packing": str(args.packing),
        "tokens_per_micro_batch": args.tokens_per_micro_batch if args.packing else "-",
        "share_prefixes": str(args.share_prefixes) if args.packing else "-",
        "seed": f"{args.seed}, data {args.data_seed}",
        "schedule": f"{args.lr_scheduler_type.value}, warmup {args.warmup_steps}, {args.num_train_epochs} epochs, max_steps {args.max_steps}",
        "learning_rate": str(args.learning_rate),
        "optimizer": f"{args.optim}, betas {args.adam_beta1} {args.adam_beta2}, epsilon {args.adam_epsilon}, decay {args.weight_decay}",
        "max_grad_norm": str(args.max_grad_norm),
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "float32",
    }


def keep_token_budget(checkpoint: str, before: dict[str, str], args) -> None:
    """`--tokens_per_micro_batch auto` measures the card's memory; a continued run takes the number that the run began with."""
    if args.packing and args.tokens_per_micro_batch == "auto" and before.get("tokens_per_micro_batch", "-") != "-":
        args.tokens_per_micro_batch = before["tokens_per_micro_batch"]
        say(f"--tokens_per_micro_batch auto: {args.tokens_per_micro_batch}, as in {checkpoint}")


def refuse_changes(checkpoint: str, before: dict[str, str], now: dict[str, str], go_on: bool) -> None:
    """Compare the run that wrote a checkpoint with this one; say each difference and what it does, and stop unless told to go on."""
    changes = [
        f"{key} was {before.get(key)!r} and is now {value!r}: {EFFECT_OF_CHANGE[key]}"
        for key, value in now.items()
        if before.get(key) != value
    ]
    if changes and not go_on:
        raise UserError(
            [f"{checkpoint} was made by a different run. " + change for change in changes]
            + [
                "Use the same settings for an exact continuation, or accept all of this with --resume_with_changes True."
            ]
        )
    for change in changes:
        say(f"warning: resuming a changed run: {change}")

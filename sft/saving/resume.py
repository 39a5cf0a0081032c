"""Choose the checkpoint that a run continues from, and refuse one that belongs to another run.

A checkpoint's manifest holds the settings that a resumed run must share. None of them holds text of the data.
"""

import dataclasses
import hashlib
import json
import os
import re
import shutil
import socket
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy
import torch

from sft.job import UserError, rank, say
from sft.model import lora
from sft.outside import counted, read_object
from sft.saving.checkpoint import INCOMPLETE, MANIFEST, gather, missing_parts, newest_first, step_of, why_not_whole
from sft.saving.export import COMPLETE


def choose_checkpoint(training_args) -> str | None:
    """The checkpoint that `--resume_from_checkpoint True | PATH` continues from; None starts at step 0. All ranks together.

    True takes the newest whole one and names every one that it had to skip. With none at all it starts at the beginning,
    which is what the first start under `torchrun --max_restarts` needs.
    """
    wanted, output_dir = str(training_args.resume_from_checkpoint or False), Path(training_args.output_dir)
    if rank() == 0:
        shutil.rmtree(output_dir / INCOMPLETE, ignore_errors=True)
    candidates = gather(newest_first(output_dir))[0]
    if wanted.lower() == "false":
        if rank() == 0:
            for folder in candidates:  # there are some only after --overwrite_output_dir True
                shutil.rmtree(folder)
        return None
    newest = wanted.lower() == "true"
    chosen = _newest_whole(candidates) if newest else _named(Path(os.path.normpath(wanted)), candidates)
    manifest = read_object(chosen / MANIFEST) if chosen else {}
    if chosen and missing_parts(list(manifest["files"]), manifest["world_size"]):
        raise UserError(
            f"{chosen} cannot be continued: it was saved with --save_only_model True, without an optimizer. To train on from its weights, "
            f"start a new run with --model_name_or_path {chosen} and another --output_dir."
        )
    say(f"resume: {chosen or f'{output_dir} holds no checkpoint yet: starting from the beginning'}")
    return str(chosen) if chosen else None


def _newest_whole(candidates: list[Path]) -> Path | None:
    problems: list[str] = []
    for folder in candidates:
        _refuse_unshared(folder)
        problem = why_not_whole(folder)
        if problem is None:
            for line in problems:
                say(f"warning: {line}. Using {folder.name} instead.")
            return folder
        problems.append(f"{folder.name} is not whole: {problem}")
    if problems:
        raise UserError([f"{candidates[0].parent}/{line}. Remove it to start from the beginning." for line in problems])
    return None


def _refuse_unshared(folder: Path) -> None:
    """A checkpoint that is not there for every rank is not damaged: who removed it as damaged would lose it."""
    seen = gather((f"rank {rank()} on {socket.gethostname()}", folder.is_dir()))
    blind = [who for who, sees in seen if not sees]
    if 0 < len(blind) < len(seen):
        who = f"{', '.join(blind[:3])}{' and others' * (len(blind) > 3)}"
        raise UserError(
            f"{folder}: it is there for other ranks, but not for {who}. Put it on a disk that all machines share."
        )


def _named(folder: Path, candidates: list[Path]) -> Path:
    _refuse_unshared(folder)
    problem = why_not_whole(folder) if step_of(folder) >= 0 else "no such checkpoint folder"
    if not problem and any(step_of(other) > step_of(folder) for other in candidates):
        problem = "this run would mix its checkpoints with newer ones. Move those away, or resume with True"
    if problem:
        names = ", ".join(other.name for other in candidates) or "no checkpoint"
        raise UserError(f"--resume_from_checkpoint {folder}: {problem}. --output_dir holds {names}.")
    return folder


def output_dir_problems(flags) -> list[str]:
    """Why a run must not write into its output_dir; empty when it may."""
    if not flags.output_dir or flags.check_data:
        return []
    output_dir = Path(flags.output_dir)
    why = _why_not_made(output_dir.absolute()) if rank() == 0 else None
    if why:
        return [f"{output_dir}: {why}. Name another --output_dir."]
    if (flags.overwrite_output_dir and flags.do_train) or str(flags.resume_from_checkpoint or False).lower() != "false":
        return []
    try:
        old, models = newest_first(output_dir), [*output_dir.glob("*.safetensors")]
    except FileNotFoundError:  # rank 0 has just tried whether it can be made, and has removed it again
        return []
    complete = (output_dir / COMPLETE).is_file()
    if old and not complete:
        cure = "Continue that with --resume_from_checkpoint True, name another --output_dir, or start again with "
        cure += "--overwrite_output_dir True, which removes its checkpoints."
        return [f"{output_dir}: it holds {old[0].name} of an earlier run. {cure}"]
    what = "a finished model" if complete else "a model that was not proved, or is another program's"
    finished = f"{output_dir}: it holds {what}. Name another --output_dir, or give --overwrite_output_dir True."
    return [finished] if old or models else []


def _why_not_made(folder: Path) -> str | None:
    """Make the folder, and remove what was made of it."""
    made: list[Path] = []
    try:
        for parent in (*reversed(folder.parents), folder):
            if not parent.is_dir():
                parent.mkdir()
                made.append(parent)
        return None if os.access(folder, os.W_OK) else "it cannot be written to"
    except OSError as error:
        return f"it cannot be made ({error.filename}: {error.strerror})"
    finally:
        for parent in reversed(made):
            parent.rmdir()


@contextmanager
def loading(checkpoint: str | None) -> Iterator[None]:
    """End in a sentence what fails while the Trainer loads a checkpoint: its files are as its manifest says, and may hold anything."""
    try:
        yield
    except Exception as error:
        names = " ".join(frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__))
        known = isinstance(error, (UserError, torch.OutOfMemoryError))
        loads = re.search("_load_|load_from_json|load_checkpoint|_init_training_state", names)
        if checkpoint is None or known or not loads:
            raise
        reason = (str(error).strip().splitlines() or [""])[0][:300]
        raise UserError(
            f"{checkpoint}: its files are those that its manifest.json lists, but cannot be loaded: {type(error).__name__}: {reason}. "
            "Remove it: the run then continues from an older one, or from the beginning."
        ) from error


def saved_identity(checkpoint: str) -> dict[str, str]:
    return read_object(Path(checkpoint) / MANIFEST).get("run", {})


LAST_DIGITS = "the same examples are computed in another order or another way: losses differ in the last digits"
# Settings that a resumed run must share, and what happens if one differs.
EFFECT_OF_CHANGE = {
    "data": "the remaining steps train on other rows than the first ones did, and rows can be seen twice or never",
    "prompt_template": "the model is taught two different prompts",
    "tokenizer": "the same text becomes other tokens than the model was trained on so far",
    "model_max_length": "rows are cut at another length",
    "model": "the saved weights and optimizer states belong to another model",
    "adapter": "the saved adapter has other shapes or other layers",
    "base_weights": "the adapter continues on other weights than it was trained on",
    "world_size": "examples meet other ranks, random states are missing, and a sharded optimizer may not load at all",
    "examples_per_step": "optimizer steps hold other examples, the position in the data moves, and the schedule has another length",
    **dict.fromkeys(("micro_batch", "packing", "tokens_per_micro_batch", "share_prefixes"), LAST_DIGITS),
    "seed": "the remaining steps draw their examples from another permutation: rows can be seen twice or never",
    "schedule": "the learning rate jumps: its curve depends on the total number of steps",
    "learning_rate": "no effect: the checkpoint's scheduler keeps its own peak (begin anew from the checkpoint's weights instead)",
    "optimizer": "no effect: the checkpoint's optimizer keeps its own settings (begin anew from the checkpoint's weights instead)",
    "max_grad_norm": "gradients are clipped at another norm",
    "precision": "steps are computed in another number format",
    "evaluation": "other evaluations decide when the run ends, or which checkpoint is exported",
}
HASHES = ("prompt_template", "tokenizer", "base_weights")  # their values in a checkpoint, which say nothing to a reader
# Every other flag that differs from its default is shared as well, but for those that the values above hold and those that
# cannot change the weights: where and what is written, logged and uploaded, on which device, what happens at the end.
HELD = re.compile(
    "data_path|source|target|messages|train_on|allow_numbers|prompt_template|eval_split|allow_control_tokens|gpt2_files|model_name_or_path|use_lora|lora_.*|fsdp|"
    "load_in_4bit|attn_implementation|parallelism_config|per_device_train_batch_size|gradient_accumulation_steps|data_seed|lr_scheduler_type|warmup_steps|max_steps|"
    "num_train_epochs|optim|adam_.*|weight_decay|bf16|fp16|activation_checkpointing(_kwargs)?|"  # the last: 5.23's other names
    "(log|logging|hub|trackio|save|plan|resume|do)_.*|cache_dir|data_cache_dir|trust_remote_code|merge_lora|check_data|output_dir|"
    "overwrite_output_dir|restore_callback_states_from_checkpoint|disable_tqdm|report_to|run_name|project|enable_jit_checkpoint|"
    "push_to_hub|use_cpu|local_rank|ddp_backend|ddp_timeout|accelerator_config|torch_empty_cache_steps|debug|skip_memory_metrics|"
    "include_num_input_tokens_seen|eval_samples|keep_gathered_weights|"
    "dataloader_(num_workers|pin_memory|persistent_workers|prefetch_factor|multiprocessing_context)"
)
# These matter only where an evaluation decides when the run ends or what is exported.
EVALUATION = re.compile(
    "eval_.*|per_device_eval_batch_size|prediction_loss_only|include_for_metrics|batch_eval_metrics|(bf|fp)16_full_eval|"
    "metric_for_best_model|greater_is_better"
)


def _as_text(value) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _short(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def run_identity(
    args, model_args, data_args, dataset, config, engine: str, template: str, tokenizer_digest: str
) -> dict[str, str]:
    """What a continued run must share with the one that it continues: readable values, and every other flag that counts."""
    tokens = hashlib.sha256()
    for part in dataset.parts:
        tokens.update(part.rows.tokens.data)
        tokens.update(part.rows.switches.data)
    for numbers in (dataset.offsets, dataset.lengths, dataset.prompt_lengths):
        tokens.update(numpy.ascontiguousarray(numbers).data)
    unshared = ("transformers_version", "_name_or_path", "dtype", "use_cache", "pad_token_id")
    shape = {name: value for name, value in config.to_diff_dict().items() if name not in unshared}

    base, adapter = "in the checkpoint", "no"
    if model_args.use_lora:
        base = lora.weights_digest(model_args.model_name_or_path, model_args.cache_dir)[:12]
        prefixes = ("lora_", "use_lora", "load_in_4bit")
        adapter = json.dumps({name: value for name, value in vars(model_args).items() if name.startswith(prefixes)})
    per_device, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    adam = f"betas {args.adam_beta1} {args.adam_beta2}, epsilon {args.adam_epsilon}, decay {args.weight_decay}"
    length = f"{args.num_train_epochs} epochs, max_steps {args.max_steps}"
    same = ("model_max_length", "world_size", "packing", "learning_rate", "max_grad_norm")
    identity = {
        "data": f"{len(dataset):,} examples, {int(dataset.lengths.sum()):,} tokens, {tokens.hexdigest()[:12]}",
        "prompt_template": _short(template),
        "tokenizer": _short(tokenizer_digest),
        "model": f"{shape.get('model_type')} {_short(_as_text(shape))}",
        "adapter": adapter,
        "base_weights": base,
        "engine": engine,
        "examples_per_step": str(args.world_size * per_device * accumulation),
        "micro_batch": f"{per_device} per device x {accumulation}",
        "seed": f"{args.seed}, data {args.data_seed}",
        "schedule": f"{args.lr_scheduler_type.value}, warmup {args.warmup_steps}, {length}",
        "optimizer": f"{args.optim}, {adam}",
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "float32",
        **{name: str(getattr(args, name)) for name in same},
        "tokens_per_micro_batch": str(args.tokens_per_micro_batch or "auto") if args.packing else "-",
        "share_prefixes": str(args.share_prefixes) if args.packing else "-",
    }
    given = {**vars(model_args), **vars(data_args), **args.to_dict()}
    if args.fsdp_config:  # without where weights lie, on the disk and on the ranks
        lie = ("state_dict_type", "hybrid_shard")
        given["fsdp_config"] = {name: value for name, value in args.fsdp_config.items() if name not in lie}
    if args.deepspeed:
        is_file = isinstance(args.deepspeed, str)
        given["deepspeed"] = _short(Path(args.deepspeed).read_text("utf-8") if is_file else _as_text(args.deepspeed))
    defaults = {f.name: f.default for kind in (args, model_args, data_args) for f in dataclasses.fields(kind)}
    flags = {
        name: _as_text(value)
        for name, value in sorted(given.items())
        if (value or None) not in (defaults.get(name) or None, "auto")
        and not HELD.fullmatch(name)
        and name not in identity
    }
    evaluation = {name: value for name, value in flags.items() if EVALUATION.fullmatch(name)}
    judged = args.load_best_model_at_end or args.early_stopping_patience or "plateau" in identity["schedule"]
    identity["evaluation"] = _as_text(evaluation) if judged else "-"
    return identity | {f"--{name}": value for name, value in flags.items() if name not in evaluation}


def keep_padding(checkpoint: str | None, before: dict[str, str], args) -> None:
    """A run that was padded, by hand or because its model cannot be packed, goes on padded."""
    if args.packing and not args.packing_asked and before.get("packing") == "False":
        args.packing = False
        say(f"packing: off, as in {checkpoint}")


def keep_token_budget(checkpoint: str | None, before: dict[str, str], args, longest: int) -> None:
    """`--tokens_per_micro_batch auto` measures the GPU's memory; a continued run takes the number that the run began with."""
    kept = before.get("tokens_per_micro_batch", "-")
    # another number of ranks leaves another amount of memory
    alike = before.get("world_size", "") == str(args.world_size)
    if args.packing and args.tokens_per_micro_batch is None and alike and kept != "-" and longest <= int(kept):
        args.tokens_per_micro_batch = int(kept)
        say(f"--tokens_per_micro_batch auto: {args.tokens_per_micro_batch}, as in {checkpoint}")


def keep_layout(checkpoint: str | None, args) -> None:
    """Load a checkpoint of FSDP's in the layout that it has, and save the run's further ones in the same."""
    plugin = args.fsdp_plugin_args
    if checkpoint is None or not plugin:
        return
    whole = Path(checkpoint, "pytorch_model_fsdp.bin").is_file()  # as these scripts saved until December 2026
    layout = "FULL_STATE_DICT" if whole else "SHARDED_STATE_DICT"
    if plugin["state_dict_type"] != layout:
        plugin["state_dict_type"] = layout
        how = "rank 0 gathers and writes everything" if whole else "each rank writes its own part"
        say(f"resume: {how} of this run's checkpoints, as it was for {checkpoint}")


def on_another_number_of_ranks(
    checkpoint: str, before: dict[str, str], now: dict[str, str], go_on: bool
) -> dict[str, str]:
    """What is left to compare where the number of ranks has changed: `before`, with all that must change with it as it is now.

    The same examples are in each optimizer step as long as ranks x per device x accumulation is what it was.

    Raises:
        UserError: the engine cannot, or steps would hold other examples.
    """
    was, ranks = before.get("world_size"), now["world_size"]
    if was is None or was == ranks or now["engine"].startswith("DeepSpeed"):
        return before
    step = before["examples_per_step"]
    problem = f"{checkpoint} was saved by {counted(int(was), 'rank')}, and this run has {ranks}. "
    if step != now["examples_per_step"]:
        if go_on:
            return before
        each, rest = divmod(int(step), int(ranks))
        cure = f"--per_device_train_batch_size x --gradient_accumulation_steps must be {each}"
        cure = f"{step} cannot be divided by {ranks}: start another number of ranks" if rest else cure
        raise UserError(
            f"{problem}Each optimizer step must keep its {step} examples (it has {now['examples_per_step']}): {cure}."
        )
    say(
        f"resume: {problem}Each optimizer step keeps its {step} examples. Losses differ in the last digits, and random numbers "
        "(dropout) are drawn anew, from --seed and the step."
    )
    return before | {name: now[name] for name in ("world_size", "micro_batch", "tokens_per_micro_batch")}


def refuse_changes(checkpoint: str, before: dict[str, str], now: dict[str, str], go_on: bool) -> None:
    """Compare the run that wrote a checkpoint with this one: print each difference and what it does; stop unless told to go on."""
    was, engine = before.get("engine", now["engine"]), now["engine"]
    if was != engine:
        cure = " (FSDP with one rank: torchrun --nproc_per_node=1)" * (was == "FSDP")
        cure = f"Start this run as that one was started{cure}."
        raise UserError(f"{checkpoint} was saved by {was}, and this run is {engine}, which cannot read it. {cure}")
    if engine.startswith("DeepSpeed") and before.get("world_size") != now["world_size"]:
        ranks = counted(int(before.get("world_size", 0)), "rank")
        raise UserError(
            f"{checkpoint} was saved by {ranks}, and this run has {now['world_size']}: {engine} reads a checkpoint on the same number "
            "alone. Start this run as that one was started."
        )
    before = on_another_number_of_ranks(checkpoint, before, now, go_on)
    unknown = ", ".join(sorted(key for key in before.keys() ^ now.keys() if not key.startswith("--")))
    if unknown:
        other = f"{checkpoint} is of another version of these scripts"
        say(f"warning: {other}. Not compared: {unknown} and flags not named in it.")
    both = (before.keys() & now.keys()) if unknown else (before.keys() | now.keys())
    changes = []
    for key in [*EFFECT_OF_CHANGE, *sorted(both - EFFECT_OF_CHANGE.keys())]:
        old, new = before.get(key, "its default"), now.get(key, "its default")
        if key in both and old != new:
            effect = EFFECT_OF_CHANGE.get(key, "the remaining steps are computed otherwise")
            differs = "is another one" if key in HASHES else f"was {old!r} and is now {new!r}"
            changes.append(f"{key} {differs}: {effect}")
    if changes and not go_on:
        cure = "Use the same settings for an exact continuation, or accept all of this with --resume_with_changes True."
        listed = [f"  - {change}" for change in changes]
        raise UserError("\n".join([f"{checkpoint} was made by a different run.", *listed, cure]))
    for change in changes:
        say(f"warning: resuming a changed run: {change}")

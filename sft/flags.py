"""Every flag once, parsed, with contradictions refused.

python -m sft.flags        prints the table of this project's own flags
"""

import dataclasses
import difflib
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers

from sft.flags_2023 import _is_true, translate
from sft.job import UserError, say, world_size


@dataclass
class ModelArguments:
    """Which model, and how it computes."""

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Model to tune: a folder, or a repository on the Hugging Face hub."}
    )
    cache_dir: str | None = field(
        default=None, metadata={"help": "Folder for models downloaded from the hub. Default: the hub's own cache."}
    )
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Run Python code that a model repository ships. Neither LLaMA nor XGen needs it here."},
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={
            "help": "Attention kernel. Default: chosen for the device and said. One that lets packed examples see "
            "each other is refused."
        },
    )
    gpt2_files: str | None = field(
        default=None,
        metadata={
            "help": "XGen only: a folder with GPT-2's vocab.json and merges.txt, for machines where tiktoken cannot "
            "download them."
        },
    )
    use_lora: bool = field(
        default=False,
        metadata={
            "help": "Train low-rank additions (LoRA) to frozen weights: no gradients or optimizer state for the model, a "
            "few tenths of a percent of it are trained. Saves an adapter."
        },
    )
    lora_r: int = field(default=16, metadata={"help": "Rank of the additions."})
    lora_alpha: int | None = field(
        default=None, metadata={"help": "The additions are scaled by alpha / r. Default: twice the rank."}
    )
    lora_dropout: float = field(default=0.05, metadata={"help": "Dropout before the additions, during training."})
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={
            "help": "Layers that get one: names such as q_proj v_proj. Default all-linear: every linear layer but the head."
        },
    )
    load_in_4bit: bool = field(
        default=False,
        metadata={
            "help": "Hold the frozen weights in 4 bits (QLoRA, NF4): a quarter of bf16's memory, slower steps, and a "
            "model that is tuned around the rounding. Needs --use_lora, bitsandbytes and a GPU."
        },
    )
    merge_lora: bool = field(
        default=False,
        metadata={
            "help": "After training write the whole model, additions merged in, instead of the adapter alone. Needs host "
            "memory for the whole model in float32. Later: python -m sft.merge_lora."
        },
    )


@dataclass
class DataArguments:
    """Which rows, and what becomes of them."""

    data_path: str | None = field(default=None, metadata={"help": "CSV file with one training example in each row."})
    source: str = field(default="prompt", metadata={"help": "Column that holds the prompts."})
    target: str = field(default="response", metadata={"help": "Column that holds the responses."})
    prompt_template: str = field(
        default="none",
        metadata={
            "help": "'none': the source column is the whole prompt. 'alpaca': wrap it in the Alpaca prompt. Else a "
            "text file with one {instruction} in it."
        },
    )
    eval_data_path: str | None = field(
        default=None,
        metadata={
            "help": "CSV file with the evaluation rows, of the same columns as --data_path. Prompts that are also trained on are counted."
        },
    )
    eval_split: float = field(
        default=0.0,
        metadata={
            "help": "Share of --data_path's rows held out for evaluation, the same rows in every run: 0.02 is one in 50. "
            "Rows with the same prompt stay on one side."
        },
    )
    data_cache_dir: str | None = field(
        default=None,
        metadata={
            "help": "Folder for the tokenized rows, about 4 bytes for each token. It can be deleted at any time. "
            "Default: ~/.cache/sft-tokenized-rows."
        },
    )
    allow_control_tokens: bool = field(
        default=False,
        metadata={
            "help": "Let a literal </s> or <|endoftext|> in a cell become the control token. Off: it is text like any other."
        },
    )
    check_data: bool = field(
        default=False,
        metadata={
            "help": "Audit the data instead of training: prints the findings, writes data_report.json and a picture of the "
            "lengths to --output_dir. Costs about as much as tokenizing; exit code 1 when the run would be useless."
        },
    )


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """The Trainer's own arguments, a few of them with another default, and this project's."""

    model_max_length: int = field(
        default=512,
        metadata={"help": "Longest example in tokens, prompt and response together. Longer ones are cut and counted."},
    )
    packing: bool = field(
        default=True,
        metadata={
            "help": "Fill micro-batches with whole examples end to end: same examples and gradient in each optimizer "
            "step, no padding. False: padded."
        },
    )
    tokens_per_micro_batch: str = field(
        default="auto",
        metadata={
            "help": "Most tokens in one packed micro-batch. auto: per device x --model_max_length, and on a GPU as many as its "
            "measured memory has room for, up to a whole step. A number: less memory, more micro-batches, the same gradient."
        },
    )
    share_prefixes: bool = field(
        default=True,
        metadata={
            "help": "Compute what prompts of a packed micro-batch begin with alike, such as their template, once for all of them: "
            "same losses and gradients. False: in each of them."
        },
    )
    compile_layers: str = field(
        default="auto",
        metadata={
            "help": "Compile the decoder layers of a packed run (torch.compile): the first step takes about 30 s longer, the "
            "others little more than half as long. auto: on a GPU, when the run is long enough. True or False."
        },
    )
    save_dtype: str | None = field(
        default=None,
        metadata={
            "help": "Type of the exported weights: float32, bfloat16 or float16. Default: the compute type. "
            "Checkpoints to resume from are always float32."
        },
    )
    overwrite_output_dir: bool = field(
        default=False,
        metadata={"help": "Train into an output folder that already holds a finished model, and replace that model."},
    )
    plan_only: bool = field(
        default=False,
        metadata={
            "help": "Print the memory plan and stop. Reads the model's config alone: no GPU, no weights, no data."
        },
    )
    plan_gpu_gib: float | None = field(
        default=None,
        metadata={"help": "With --plan_only: plan for a GPU with this much memory, such as 80. Default: the one here."},
    )
    plan_world_size: int | None = field(
        default=None, metadata={"help": "With --plan_only: plan for this many GPUs. Default: torchrun's number."}
    )
    save_rehearsal: bool = field(
        default=True,
        metadata={
            "help": "Before the first step, gather and save once into a scratch folder and compare the disk's free space with "
            "all that the run will keep: seconds now instead of a failure after days."
        },
    )
    resume_with_changes: bool = field(
        default=False,
        metadata={
            "help": "Resume although data, model or settings differ from the checkpoint's. Each difference is said."
        },
    )
    eval_samples: int = field(
        default=4,
        metadata={
            "help": "Answer this many evaluation prompts after each evaluation, greedily, and keep the answers in "
            "run_report.json. Up to 128 forward passes more for each evaluation. 0: none."
        },
    )
    early_stopping_patience: int = field(
        default=0,
        metadata={"help": "Stop after this many evaluations in a row without a lower evaluation loss. 0: never."},
    )
    # Defaults of the Trainer that would hide something or keep more than this project uses.
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Hide NaN and infinite losses from the log. Off: a broken run must show."}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Kept off: the dataset has no such columns."})
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Search for parameters without a gradient in each step. None here has none."}
    )
    prediction_loss_only: bool = field(
        default=True, metadata={"help": "Evaluate the loss alone: logits of an evaluation set do not fit in memory."}
    )

    def __getstate__(self) -> dict:
        """Leave the hub's token out of every pickle: the Trainer puts one into the folder that it uploads."""
        return vars(self) | {"hub_token": None}


class Parser(transformers.HfArgumentParser):
    """Flags from dataclasses, with a UserError for what argparse cannot make sense of."""

    def error(self, message: str):
        raise UserError(f"{message}. `--help` lists every flag.")


def parser() -> transformers.HfArgumentParser:
    """The command line's parser. Abbreviated flags are unknown flags: a typo must not become another flag."""
    return Parser(
        (ModelArguments, DataArguments, TrainingArguments),
        description="Instruction-tune a causal language model on a CSV of prompts and responses.",
        allow_abbrev=False,
    )


def parse(
    argv: list[str] | None = None, checks: tuple[Callable[..., list[str]], ...] = ()
) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """Parse a command line, of today or of 2023, and say what was translated.

    Args:
        argv: the words after the script's name; default `sys.argv[1:]`.
        checks: functions of the parsed flags (a namespace) that return problems; everything that can be known before
            anything slow is raised at once.

    Raises:
        UserError: with every problem found.
    """
    argv, notices, problems = translate(list(sys.argv[1:] if argv is None else argv))
    known = parser()
    flags, unknown = known.parse_known_args(argv)
    problems += unknown_flags(known, unknown)
    if not flags.use_cpu and not torch.accelerator.is_available() and not flags.plan_only:
        flags.use_cpu = True
        notices.append("no GPU was found: this run is on the CPU")
    if flags.use_cpu:  # where it is installed, accelerate imports DeepSpeed, which (0.19.8) warns that it found no GPU
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    elif flags.accelerator_config is None and flags.dataloader_pin_memory:
        flags.accelerator_config = {"non_blocking": True}  # copies do not wait for the work that the GPU has in hand
    problems += _read_fsdp_config(flags)
    if (flags.fsdp_config or {}).get("cpu_offload") and not flags.use_cpu and flags.ddp_backend is None:
        flags.ddp_backend = "cuda:nccl,cpu:gloo"  # the norm of gradients that lie in host memory is summed by gloo
    problems += _contradictions(flags)
    if problems and flags.plan_only:
        raise UserError(problems)
    for check in checks:
        problems += check(flags)
    if problems:
        raise UserError(problems)
    notices += _drop_fsdp_where_nothing_is_sharded(flags)
    for notice in notices:
        say(notice)
    try:
        model_args, data_args, training_args = (
            kind(**{f.name: getattr(flags, f.name) for f in dataclasses.fields(kind) if f.init})
            for kind in known.dataclass_types
        )
    except (ValueError, ImportError) as error:  # the Trainer's own checks of its arguments
        raise UserError(str(error)) from error
    return model_args, data_args, training_args


def unknown_flags(known: transformers.HfArgumentParser, words: list[str]) -> list[str]:
    """One problem for each word that `parse_known_args` left over, with the nearest flag there is."""
    flags = [word for word in words if word.startswith("-")]
    if not flags:
        return [f"{word!r} belongs to no flag. A value with spaces needs quotes." for word in words]
    return [_unknown_flag(known, word) for word in flags]


def _unknown_flag(known: transformers.HfArgumentParser, word: str) -> str:
    name = word.split("=")[0]
    options = [option for option in known._option_string_actions if "-" not in option.lstrip("-")]
    name = "--" + name.lstrip("-").replace("-", "_")
    near = [option for option in options if option.startswith(name)]
    near = near or difflib.get_close_matches(name, options, n=1, cutoff=0.6)
    return f"unknown flag {name}." + (f" Did you mean {near[0]}?" if near else " `--help` lists every flag.")


def _read_fsdp_config(flags) -> list[str]:
    """Make --fsdp_config a dict, whether it was given as JSON or as the path of a JSON file, and --fsdp true a boolean.

    transformers 5.23 parses `--fsdp true` as the text, and then refuses it as an unknown word of the former spelling.
    """
    if isinstance(flags.fsdp, str) and flags.fsdp.lower() in ("true", "false"):
        flags.fsdp = _is_true(flags.fsdp) or None
    given = flags.fsdp_config
    flags.fsdp_config = None
    if given is None:
        return []
    try:
        flags.fsdp_config = json.loads(given if given.lstrip().startswith("{") else Path(given).read_text("utf-8"))
    except OSError as error:
        return [f"--fsdp_config {given}: {error.strerror}. Give a JSON file, or the JSON itself in quotes."]
    except ValueError as error:
        return [f"--fsdp_config {given}: not JSON ({error})."]
    return []


def _drop_fsdp_where_nothing_is_sharded(flags) -> list[str]:
    """accelerate 1.15 does not shard on the CPU and falls back to DDP without a word; here it is said."""
    if not flags.fsdp or not (flags.use_cpu or "WORLD_SIZE" not in os.environ):
        return []
    flags.fsdp, flags.fsdp_config = None, None
    where = "on the CPU" if flags.use_cpu else "in a process without torchrun"
    kind = "this run is plain DDP, each process holds" if world_size() > 1 else "this process holds"
    return [f"--fsdp: Accelerate does not shard {where}: {kind} the whole model"]


def _contradictions(flags) -> list[str]:
    problems = [
        f"--{name} is missing: {what}."
        for name, what in (
            ("model_name_or_path", "the model to tune, a folder or a hub repository"),
            ("data_path", "the CSV file to train on"),
            ("output_dir", "the folder for the tuned model"),
        )
        if not getattr(flags, name) and (name == "model_name_or_path" or not flags.plan_only)
    ]
    if not flags.plan_only and (flags.plan_gpu_gib or flags.plan_world_size):
        problems.append("--plan_gpu_gib and --plan_world_size plan for another machine. Add --plan_only True.")
    if flags.fsdp and flags.deepspeed:
        problems.append("--fsdp and --deepspeed both shard the model. Choose one.")
    if flags.gradient_checkpointing and (flags.fsdp_config or {}).get("activation_checkpointing"):
        problems.append(
            '--gradient_checkpointing True and "activation_checkpointing" in --fsdp_config both recompute. Choose one.'
        )
    if flags.bf16 and flags.fp16:
        problems.append("--bf16 and --fp16 are two compute types. Choose one; bf16 where the GPU has it.")
    if flags.tokens_per_micro_batch != "auto" and not re.fullmatch("[1-9][0-9]*", flags.tokens_per_micro_batch):
        problems.append(f"--tokens_per_micro_batch {flags.tokens_per_micro_batch}: give auto or a number of tokens.")
    if flags.compile_layers not in ("auto", "True", "False"):
        problems.append(f"--compile_layers {flags.compile_layers}: choose auto, True or False.")
    if flags.packing and not flags.average_tokens_across_devices:
        problems.append(
            "--average_tokens_across_devices False makes the loss depend on which rank has which example, which packing "
            "changes. Remove the flag, or add --packing False."
        )
    if flags.save_dtype not in (None, "float32", "bfloat16", "float16"):
        problems.append(f"--save_dtype {flags.save_dtype}: choose float32, bfloat16 or float16.")
    for name in ("model_max_length", "per_device_train_batch_size", "gradient_accumulation_steps"):
        if getattr(flags, name) < 1:
            problems.append(f"--{name} {getattr(flags, name)}: it must be at least 1.")
    if flags.train_sampling_strategy != "random" and flags.packing:
        problems.append(
            f"--train_sampling_strategy {flags.train_sampling_strategy} changes which examples share a step, to save "
            "padding. Packing computes no padding and keeps the steps: remove the flag, or add --packing False."
        )
    return problems


def flags_table() -> str:
    """This project's own flags as a Markdown table, from the fields above."""
    inherited = {f.name: f.default for f in dataclasses.fields(transformers.TrainingArguments)}
    rows = ["| flag | default | what it does |", "|---|---|---|"]
    for kind in (ModelArguments, DataArguments, TrainingArguments):
        for f in dataclasses.fields(kind):
            if f.name in inherited and inherited[f.name] == f.default:
                continue
            default = "" if f.default in (None, dataclasses.MISSING) else f"`{f.default}`"
            rows.append(f"| `--{f.name}` | {default} | {f.metadata['help']} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(flags_table())

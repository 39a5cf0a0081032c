"""Declare every flag once, parse the command line, and refuse contradictions.

python -m sft.flags        prints the table of this project's own flags
"""

import dataclasses
import os
import re
import sys
from argparse import SUPPRESS, Action, ArgumentTypeError
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import transformers

from sft import VERSION
from sft.flags_2023 import is_true, names_in, read_json, translate, unknown_flags
from sft.job import UserError, all_ranks_or_none, commit, differences_from_rank_0, say
from sft.launchers import drop_fsdp_where_nothing_is_sharded, read_environment, shard_inside_machines
from sft.trainer_flags import FIELDS, OTHER_DEFAULTS, trainer_problems, without_effect


def flag(default: Any, help_text: str) -> Any:
    return field(default=default, metadata={"help": help_text})


def _other_default(name: str) -> Any:
    return field(default=OTHER_DEFAULTS[name], metadata=FIELDS[name].metadata)


@dataclass
class ModelArguments:
    """Which model, and how it computes."""

    _argument_group_name = "model"  # a heading of --help

    model_name_or_path: str | None = flag(None, "Model to tune: a folder, or a repository on the Hugging Face hub.")
    cache_dir: str | None = flag(None, "Folder for models downloaded from the hub. Default: the hub's own cache.")
    trust_remote_code: bool = flag(False, "Run Python code from the model's repository. LLaMA and XGen need none.")
    allow_new_weights: str | None = flag(
        None,
        "NAME[,NAME]: weights that the checkpoint lacks and that are to be trained from random numbers. Others are refused.",
    )
    attn_implementation: str | None = flag(
        None,
        "Attention kernel. Default: chosen for the device. One that lets packed examples see each other is refused.",
    )
    gpt2_files: str | None = flag(
        None, "XGen only: a folder with GPT-2's vocab.json and merges.txt, where tiktoken cannot download them."
    )
    use_lora: bool = flag(
        False,
        "Train low-rank additions (LoRA) to frozen weights: no gradients or optimizer state for the model, a "
        "few tenths of a percent of it are trained. Saves an adapter.",
    )
    lora_r: int = flag(16, "Rank of the additions.")
    lora_alpha: int | None = flag(None, "The additions are scaled by alpha / r. Default: twice the rank.")
    lora_dropout: float = flag(0.05, "Dropout before the additions, during training.")
    lora_target_modules: list[str] | None = field(
        default=None,
        metadata={"help": "Layers that get one, such as q_proj v_proj. Default: every linear layer but the head."},
    )
    load_in_4bit: bool = flag(
        False,
        "Hold the frozen weights in 4 bits (QLoRA, NF4): a quarter of bf16's memory, slower steps, and a "
        "model tuned around the rounding. Needs --use_lora, bitsandbytes and a GPU.",
    )
    merge_lora: bool = flag(
        False,
        "After training write the whole model, additions merged in, instead of the adapter alone. Needs host "
        "memory for the whole model in float32. Later: python -m sft.merge_lora.",
    )


@dataclass
class DataArguments:
    """Which rows, and what becomes of them."""

    _argument_group_name = "data"

    data_path: list[str] | None = field(
        default=None,
        metadata={
            "help": "One or several files of training examples: .csv, .tsv, .json, .jsonl or .parquet. 'FILE*3' takes its rows "
            "three times, 'FILE*0.5' half of them."
        },
    )
    source: str = flag("prompt", "Column that holds the prompts.")
    target: str = flag("response", "Column that holds the responses.")
    messages: str | None = flag(
        None,
        "Column that holds whole conversations, lists of {role, content} or {from, value} (in a CSV as JSON), in place of "
        "--source and --target.",
    )
    train_on: str = flag("all", "With --messages: train on all answers of a conversation, or on the last one.")
    train_on_prompt: bool = flag(False, "Train on what is read too, in place of the answers alone.")
    prompt_template: str = flag(
        "none",
        "'none': the source column is the whole prompt. 'alpaca': Alpaca's prompt, with {input} where a row has one. 'chat': "
        "the tokenizer's own chat template. 'turns': one in plain text. Else a text file with {instruction} (the source column) "
        "or other {columns} in it, or a .jinja file. With --messages 'none' is 'chat' where there is one, else 'turns'.",
    )
    eval_data_path: list[str] | None = field(
        default=None,
        metadata={
            "help": "The same for evaluation, in the same columns. Prompts that are also trained on are counted."
        },
    )
    eval_split: float = flag(
        0.0,
        "Share of --data_path's rows held out for evaluation, the same rows in every run: 0.02 is one in 50. "
        "Rows with the same prompt stay on one side.",
    )
    data_cache_dir: str | None = flag(
        None,
        "Folder for the tokenized rows, about 4 bytes a token; delete it at will. Default: ~/.cache/sft-tokenized-rows.",
    )
    allow_control_tokens: bool = flag(
        False, "Let a literal </s> or <|endoftext|> in a cell become the control token. Off: it is text like any other."
    )
    allow_numbers: bool = flag(
        False, "Take numbers of JSON and parquet as they are written. Off: a number in place of a text is an error."
    )
    check_data: bool = flag(
        False,
        "Audit the data instead of training: prints the findings, writes data_report.json and a picture of the "
        "lengths to --output_dir. Costs about as much as tokenizing; exit code 1 when the run would be useless.",
    )

    def __post_init__(self) -> None:
        for name in ("data_path", "eval_data_path"):
            value = getattr(self, name)
            setattr(self, name, [value] if isinstance(value, str) else value)


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """The Trainer's own arguments, a few of them with another default, and this project's."""

    _argument_group_name = "training: this project's own flags, then the Trainer's (docs/flags.md)"

    model_max_length: int = flag(
        512, "Longest example in tokens, prompt and response. Longer ones are cut and counted."
    )
    packing_asked: bool = dataclasses.field(default=False, init=False)  # --packing was given by hand
    packing: bool = flag(
        True,
        "Fill micro-batches with whole examples end to end: same examples and gradient in each optimizer "
        "step, no padding. False: padded.",
    )
    tokens_per_micro_batch: int | None = flag(
        None,
        "Most tokens in one packed micro-batch. auto: per device x --model_max_length, and on a GPU as many as its "
        "measured memory has room for, up to a whole step. A number: less memory, more micro-batches, the same gradient.",
    )
    share_prefixes: bool = flag(
        True,
        "Compute what several prompts of a micro-batch begin with, such as a template, once: same losses, same gradients.",
    )
    compile_layers: bool | None = flag(
        None,
        "Compile the decoder layers: the first step takes 30 s longer, the others half as long. auto: on a GPU, in a long run.",
    )
    keep_gathered_weights: bool | None = flag(
        None,
        "With --fsdp full_shard: do not gather weights again for the backward pass. Same numbers. auto: if memory has room.",
    )
    capture_steps: bool | None = flag(None, "Replay small steps as CUDA graphs. auto: on one GPU, where it is faster.")
    save_dtype: str | None = flag(
        None,
        "Type of the exported weights: float32, bfloat16 or float16. Default: the compute type. "
        "Checkpoints to resume from are always float32.",
    )
    overwrite_output_dir: bool = flag(False, "Train into a folder that holds a finished model, and replace that.")
    plan_only: bool = flag(
        False,
        "Print the memory plan and stop, exit code 1 if it does not fit. Reads the model's config: no GPU, weights or data.",
    )
    plan_gpu_gib: float | None = flag(None, "With --plan_only: plan for a GPU of this many GiB. Default: the one here.")
    plan_world_size: int | None = flag(None, "With --plan_only: plan for this many GPUs. Default: torchrun's number.")
    plan_network_gb_s: float | None = flag(
        None, "GB/s of each GPU to other machines, for the plan's line on communication."
    )
    save_rehearsal: bool = flag(
        True,
        "Before the first step, gather and save once into a scratch folder and compare the disk's free space with "
        "all that the run will keep: seconds now instead of a failure after days.",
    )
    resume_with_changes: bool = flag(
        False, "Resume although data, model or settings differ from the checkpoint's. Each difference is printed."
    )
    eval_samples: int = flag(
        4,
        "Answer this many evaluation prompts after each evaluation, greedily, and keep the answers in "
        "run_report.json. Up to 128 forward passes more for each evaluation. 0: none.",
    )
    early_stopping_patience: int = flag(0, "Stop after this many evaluations in a row without a lower loss. 0: never.")
    # with other defaults than the Trainer's, and why: sft/trainer_flags.py
    logging_nan_inf_filter: bool = _other_default("logging_nan_inf_filter")
    remove_unused_columns: bool = _other_default("remove_unused_columns")
    ddp_find_unused_parameters: bool | None = _other_default("ddp_find_unused_parameters")
    do_train: bool = _other_default("do_train")
    prediction_loss_only: bool = _other_default("prediction_loss_only")

    def __getstate__(self) -> dict:
        """Leave the hub's token out of every pickle: the Trainer puts one into the folder that it uploads."""
        return vars(self) | {"hub_token": None}

    def to_dict(self) -> dict[str, Any]:
        values = super().to_dict()
        return values | {name: "auto" for name in AUTO if values[name] is None}


def _tokens(text: str) -> int:
    if int(text) < 1:
        raise ValueError
    return int(text)


def _auto_or(text: str, read: Callable[[str], Any] = is_true, values: str = "True or False") -> Any:
    try:
        return None if text == "auto" else read(text)
    except (ValueError, ArgumentTypeError):
        raise ArgumentTypeError(f"{text!r} is neither auto nor {values}") from None


AUTO = {  # flags that are None where the user wrote auto, or nothing, and how they are read
    "tokens_per_micro_batch": partial(_auto_or, read=_tokens, values="a number of tokens"),
    **dict.fromkeys(("compile_layers", "keep_gathered_weights", "capture_steps"), _auto_or),
}


OF_A_MACHINE = (  # flags that may differ between ranks: where files lie (what is in them is compared later), and what a launcher adds
    "model_name_or_path cache_dir gpt2_files data_path eval_data_path data_cache_dir prompt_template deepspeed hub_token local_rank"
).split()


class Parser(transformers.HfArgumentParser):
    """Flags from dataclasses, with a UserError for what argparse cannot make sense of."""

    def error(self, message: str):
        # of HfArgumentParser's booleans (transformers 5.23)
        message = re.sub(
            r"^argument (\S+): Truthy value expected: got (.*) but .*", r"\1 \2: give True or False", message
        )
        raise UserError(f"{message.rstrip('.')}. `--help` lists every flag.")


class ShowVersion(Action):
    def __call__(self, parser, namespace, values, option_string=None):
        print(f"{parser.prog} {VERSION} (commit {commit()})")
        parser.exit()


def parser() -> transformers.HfArgumentParser:
    """The command line's parser. Abbreviated flags are unknown flags: a typo must not become another flag."""
    known = Parser(
        (ModelArguments, DataArguments, TrainingArguments),
        description="Instruction-tune a causal language model on a CSV of prompts and responses.",
        usage="%(prog)s --model_name_or_path MODEL --data_path FILE --output_dir FOLDER [flags]",
        allow_abbrev=False,
    )
    known.add_argument(
        "--version", action=ShowVersion, nargs=0, default=SUPPRESS, help="Print the version and the commit, and stop."
    )
    training = known._action_groups[-1]  # as HfArgumentParser made it
    training._group_actions.sort(key=lambda action: action.dest in FIELDS)
    known._negative_number_matcher = re.compile(r"-\.?\d")  # -1e-5 is one too; Python 3.11 knows no exponent
    for name, read in AUTO.items():
        action = known._option_string_actions[f"--{name}"]
        action.type, action.default = read, "auto"
    known._option_string_actions["--liger_kernel_config"].type = str  # JSON, read in sft/trainer_flags.py
    # its type is text or a boolean, and HfArgumentParser (5.23) takes the boolean alone
    known._option_string_actions["--include_num_input_tokens_seen"].type = lambda t: "no" if t == "False" else t
    return known


def parse(
    argv: list[str] | None = None, checks: tuple[Callable[..., list[str]], ...] = ()
) -> tuple[ModelArguments, DataArguments, TrainingArguments]:
    """Parse a command line, of today or of 2023, and print what was translated.

    Args:
        argv: the words after the script's name; default `sys.argv[1:]`.
        checks: functions of the parsed flags (a namespace) that return problems.

    Raises:
        UserError: on every rank, with every problem that any rank found, before anything slow.
    """
    known = parser()
    argv = list(sys.argv[1:] if argv is None else argv)
    with all_ranks_or_none():
        flags, notices = _read(known, argv, checks)
    with all_ranks_or_none():
        given = {f"--{name}": repr(value) for name, value in vars(flags).items() if name not in OF_A_MACHINE}
        if problems := differences_from_rank_0(given):
            raise UserError(problems)
    for notice in notices:
        say(notice)
    try:
        model_args, data_args, training_args = (
            kind(**{f.name: getattr(flags, f.name) for f in dataclasses.fields(kind) if f.init})
            for kind in known.dataclass_types
        )
    except (ValueError, ImportError) as error:  # the Trainer's own checks of its arguments
        raise UserError(str(error)) from error
    training_args.packing_asked = any(word.split("=")[0] == "--packing" for word in argv)
    return model_args, data_args, training_args


def _read(
    known: transformers.HfArgumentParser, argv: list[str], checks: tuple[Callable[..., list[str]], ...]
) -> tuple[Any, list[str]]:
    """The flags as a namespace, and notices of what was changed in them."""
    argv, notices, problems = translate(argv)
    flags, unknown = known.parse_known_args(argv)
    problems += unknown_flags(known, unknown)
    for found, more in zip((notices, problems), read_environment(flags, argv)):
        found += more
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
    problems += _contradictions(flags) + trainer_problems(flags)
    if problems and flags.plan_only:
        raise UserError(problems)
    for check in checks:
        problems += check(flags)
    if problems:
        raise UserError(problems)
    notices += without_effect(flags, names_in(argv)) + drop_fsdp_where_nothing_is_sharded(flags)
    return flags, notices + shard_inside_machines(flags)


def _read_fsdp_config(flags) -> list[str]:
    """Make --fsdp_config a dict, whether it was given as JSON or as the path of a JSON file, and --fsdp true a boolean.

    transformers 5.23 parses `--fsdp true` as the text, and then refuses it as an unknown word of the former spelling.
    """
    if isinstance(flags.fsdp, str) and flags.fsdp.lower() in ("true", "false"):
        flags.fsdp = is_true(flags.fsdp) or None
    given, flags.fsdp_config = flags.fsdp_config, None
    try:
        flags.fsdp_config = read_json("--fsdp_config", given) if given else None
    except ValueError as error:
        return [str(error)]
    if flags.fsdp:  # without the prefix that Accelerate's own files have
        config = {name.removeprefix("fsdp_"): value for name, value in (flags.fsdp_config or {}).items()}
        if str(config.get("version", 2)) == "2" and not checkpoints_are_models(flags):
            config.setdefault("state_dict_type", "SHARDED_STATE_DICT")  # each rank writes its own part
        flags.fsdp_config = config
    return []


def checkpoints_are_models(flags) -> bool:
    """Whether a checkpoint must be a model that can be loaded: where it is nothing else, or is uploaded as one."""
    return flags.save_only_model or (flags.push_to_hub and flags.hub_strategy != "end")


def _contradictions(flags) -> list[str]:
    plans, fsdp_recomputes = flags.plan_only, (flags.fsdp_config or {}).get("activation_checkpointing")
    refused_when: dict[str, Any] = {
        "--model_name_or_path is missing: the model to tune, a folder or a hub repository.": not flags.model_name_or_path,
        "--data_path is missing: the file to train on.": not flags.data_path and flags.do_train and not plans,
        "--output_dir is missing: the folder for the tuned model.": not flags.output_dir and not plans,
        "--plan_gpu_gib and --plan_world_size plan for another machine. Add --plan_only True.": not plans
        and (flags.plan_gpu_gib or flags.plan_world_size),
        "--fsdp and --deepspeed both shard the model. Choose one.": flags.fsdp and flags.deepspeed,
        '--gradient_checkpointing True and "activation_checkpointing" in --fsdp_config both recompute. '
        "Choose one.": flags.gradient_checkpointing and fsdp_recomputes,
        "--bf16 and --fp16 are two compute types. Choose one; bf16 where the GPU has it.": flags.bf16 and flags.fp16,
        f"--save_dtype {flags.save_dtype}: choose float32, bfloat16 or float16.": flags.save_dtype
        not in (None, "float32", "bfloat16", "float16"),
    }
    return [message for message, refused in refused_when.items() if refused]


def flags_table() -> str:
    """This project's own flags as a Markdown table, from the fields above."""
    rows = ["| flag | default | what it does |", "|---|---|---|"]
    for kind in (ModelArguments, DataArguments, TrainingArguments):
        for f in dataclasses.fields(kind):
            if f.name in FIELDS or not f.init:
                continue
            default = "auto" if f.name in AUTO else f.default
            rows.append(f"| `--{f.name}` | {'' if default is None else f'`{default}`'} | {f.metadata['help']} |")
    return "\n".join(rows)


if __name__ == "__main__":
    print(flags_table())

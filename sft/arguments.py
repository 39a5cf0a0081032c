"""Every flag once, the names of 2023 translated, contradictions refused, and how a run speaks to its user.

python -m sft.arguments        prints the table of this project's own flags that stands in the README
"""

import dataclasses
import difflib
import json
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import transformers
from torch.distributed import PrefixStore, TCPStore

# ------------------------------------------------------------------------------------------------ speaking and ending

# peft 0.21 (and sft/budget.py, for transformers 5.17) read a name that transformers 5.23 is about to drop
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)


class UserError(Exception):
    """A mistake that the user can mend: what is wrong, where, and what to do.

    The entry scripts end it in one message on stderr, no traceback, and exit code 2 from every rank.

    Args:
        problems: one message, or a list of them that were found together.
    """

    def __init__(self, problems: str | list[str]):
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


def rank() -> int:
    """This process's rank in the job, as torchrun sets it; 0 without torchrun."""
    return int(os.environ.get("RANK", "0"))


def local_rank() -> int:
    """This process's rank on its machine, as torchrun sets it; 0 without torchrun."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def world_size() -> int:
    """The number of processes in the job, as torchrun sets it; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def say(text: object) -> None:
    """Print once for the job (rank 0), at once."""
    if rank() == 0:
        print(text, file=sys.stdout, flush=True)


@contextmanager
def one_message_for_user_errors() -> Iterator[None]:
    """End a UserError in one message on stderr (the lowest failing rank's copy) and exit code 2 from every rank."""
    try:
        yield
    except UserError as error:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun's, to the ranks that end a moment after the first
        problems = _meet_at_the_exit(error.problems)
        if problems:
            head = problems if len(problems) == 1 else [f"{len(problems)} problems", *(f"  - {p}" for p in problems)]
            print("error: " + "\n".join(head), file=sys.stderr, flush=True)
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        raise SystemExit(2) from None


def _meet_at_the_exit(problems: list[str], patience: timedelta = timedelta(seconds=20)) -> list[str]:
    """Wait for the other ranks' ends and return the problems that this rank should print (none, if another does).

    torchrun stops every process as soon as one has failed, so a rank that left first would cut off the others'
    exit codes, and with them the message of a rank that knows more. A rank that does not fail is not waited for
    longer than `patience`.
    """
    if world_size() == 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return problems if rank() == 0 or not problems else []
    agent = TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=patience)
    # The agent's store outlives a restart of the workers: each attempt meets under its own name.
    store = PrefixStore(f"user_error/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", agent)
    everyone = [str(index) for index in range(world_size())]
    store.set(str(rank()), json.dumps(problems))
    try:
        store.wait(everyone, patience)
    except torch.distributed.DistStoreError:
        everyone = [name for name in everyone if store.check([name])]
    if str(rank()) != everyone[0]:
        found: list[str] = []
    else:
        found = list(dict.fromkeys(problem for name in everyone for problem in json.loads(store.get(name))))
    # The store may live in this machine's agent: no rank leaves before all have read.
    store.set(f"read/{rank()}", "")
    with suppress(torch.distributed.DistStoreError):  # a rank that was killed meanwhile reads nothing
        store.wait([f"read/{name}" for name in everyone], patience)
    return found


@contextmanager
def all_ranks_or_none() -> Iterator[None]:
    """Raise on every rank the UserErrors that any rank met inside.

    A file that is missing on one machine of several must not leave the other machines waiting in a collective. The
    wait here has no NCCL in it and lasts as long as the slowest rank's work.
    """
    group = None
    if torch.distributed.is_initialized() and world_size() > 1:
        group = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=7))
    problems: list[str] = []
    try:
        yield
    except UserError as error:
        problems = error.problems
    if group is not None:
        every: list[list[str]] = [[]] * world_size()
        torch.distributed.all_gather_object(every, problems, group=group)
        problems = list(dict.fromkeys(problem for found in every for problem in found))
    if problems:
        raise UserError(problems)


# ------------------------------------------------------------------------------------------------------- the flags


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
    lora_r: int | None = field(default=None, metadata={"help": "Rank of the additions. Default 16."})
    lora_alpha: int | None = field(
        default=None, metadata={"help": "The additions are scaled by alpha / r. Default: twice the rank."}
    )
    lora_dropout: float | None = field(
        default=None, metadata={"help": "Dropout before the additions, during training. Default 0.05."}
    )
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
            "memory for the whole model in float32. Later: python -m sft.lora merge."
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


# ------------------------------------------------------------------------------------------- the names of 2023

RENAMED = {  # transformers 4.31 -> 5.x, and two misspellings of the original README's parameter table
    "evaluation_strategy": "eval_strategy",
    "num_training_epochs": "num_train_epochs",
    "warmup_ratio": "warmup_steps",
    "no_cuda": "use_cpu",
    "per_gpu_train_batch_size": "per_device_train_batch_size",
    "per_gpu_eval_batch_size": "per_device_eval_batch_size",
    "push_to_hub_token": "hub_token",
    "push_to_hub_model_id": "hub_model_id",
}
WRAP_CLASS = ("fsdp_transformer_layer_cls_to_wrap", "fsdp_transformer_later_cls_to_wrap")
GONE = {  # flag -> what to do without it
    "use_mps_device": "an Apple GPU is used where there is one",
    "jit_mode_eval": "there is no such mode",
    "use_ipex": "there is no such mode",
    "fp16_opt_level": "apex is not used",
    "half_precision_backend": "PyTorch's own mixed precision is used",
    "fp16_backend": "PyTorch's own mixed precision is used",
    "sharded_ddp": "use --fsdp",
    "fsdp_min_num_params": "the model's layers are wrapped by their class",
    "adafactor": "use --optim adafactor",
    "use_legacy_prediction_loop": "there is one loop",
    "torchdynamo": "use --torch_compile_backend",
    "xpu_backend": "use --ddp_backend",
    "push_to_hub_organization": "use --hub_model_id organization/name",
}


def _is_true(value: str) -> bool:
    return transformers.hf_argparser.string_to_bool(value)


def translate(argv: list[str]) -> tuple[list[str], list[str], list[str]]:
    """Rewrite the flags of 2023 as today's.

    ["--evaluation_strategy", "no"] -> ["--eval_strategy", "no"] and "`--evaluation_strategy no` is now `--eval_strategy no`"

    Returns: the arguments to parse, one notice for each change, and the problems (a value that has no translation).
    """
    flags = _split_into_flags(argv)
    out, notices, problems = [], [], []
    fsdp_config: dict[str, object] = {}
    fsdp_old: list[str] = []

    for name, values in flags:
        old = " ".join([f"--{name}", *(value if " " not in value else f'"{value}"' for value in values)]).strip()
        new: list[str] | None = None
        if name in RENAMED:
            if name == "warmup_ratio" and not (values and _is_ratio(values[0])):
                problems.append(f"`{old}`: a ratio lies between 0 and 1. For a number of steps use --warmup_steps.")
                continue
            new = [f"--{RENAMED[name]}", *values]
        elif name in WRAP_CLASS and values:
            fsdp_config["transformer_layer_cls_to_wrap"] = values
            fsdp_old.append(old)
            continue
        elif name == "fsdp" and values and values[0].lower() not in ("true", "false"):
            words = " ".join(values).split()
            known = {"full_shard": True, "shard_grad_op": False}
            unknown = [word for word in words if word not in (*known, "auto_wrap", "offload")]
            if unknown:
                problems.append(
                    f"`{old}`: FSDP2 has no {unknown[0]!r}. Known words: full_shard, shard_grad_op, auto_wrap, offload."
                )
                continue
            fsdp_config["reshard_after_forward"] = all(known.get(word, True) for word in words)
            if "offload" in words:
                fsdp_config["cpu_offload"] = True
            fsdp_old.insert(0, old)
            continue
        elif name == "group_by_length":
            wanted = not values or _is_true(values[0])
            new = ["--train_sampling_strategy", "group_by_length"] if wanted else []
        elif name == "include_tokens_per_second":
            new = []  # tokens per second are on every logged line
        elif name == "save_safetensors":
            if values and not _is_true(values[0]):
                problems.append(f"`{old}`: models are always saved as safetensors, never as pickles. Remove the flag.")
                continue
            new = []
        elif name == "logging_dir" and values:
            os.environ["TENSORBOARD_LOGGING_DIR"] = values[0]
            notices.append(f"`{old}` is now the environment variable TENSORBOARD_LOGGING_DIR (set for this run)")
            continue
        elif name in GONE:
            problems.append(f"`--{name}` no longer exists: {GONE[name]}. Remove the flag.")
            continue

        if new is None:
            out += [f"--{name}", *values] if name else values
        else:
            out += new
            notices.append(f"`{old}` is now `{' '.join(new)}`" if new else f"`{old}` is no longer needed")

    if fsdp_old:
        given = _value_of(out, "fsdp_config")
        if given is not None and Path(given).is_file():
            given = Path(given).read_text(encoding="utf-8")
        try:
            # one rank reads the checkpoint into host memory and hands the others their shards
            defaults = {"version": 2, "cpu_ram_efficient_loading": True}
            merged = {**defaults, **fsdp_config, **json.loads(given or "{}")}
        except ValueError as error:
            return out, notices, [*problems, f"--fsdp_config {given}: neither a JSON file nor JSON ({error})."]
        out = [*_without(out, "fsdp_config"), "--fsdp", "true", "--fsdp_config", json.dumps(merged)]
        notices.append(f"`{' '.join(fsdp_old)}` is now `--fsdp true --fsdp_config '{json.dumps(merged)}'`")
    return out, notices, problems


def _split_into_flags(argv: list[str]) -> list[tuple[str, list[str]]]:
    """["--a", "1", "--b=2"] -> [("a", ["1"]), ("b", ["2"])]; a leading value without a flag has the name ""."""
    flags: list[tuple[str, list[str]]] = []
    for word in argv:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            flags.append((name.replace("-", "_"), [value] if equals else []))
        elif flags:
            flags[-1][1].append(word)
        else:
            flags.append(("", [word]))
    return flags


def _is_ratio(value: str) -> bool:
    try:
        return 0 <= float(value) < 1
    except ValueError:
        return False


def _value_of(argv: list[str], name: str) -> str | None:
    return next((values[-1] for flag, values in reversed(_split_into_flags(argv)) if flag == name and values), None)


def _without(argv: list[str], name: str) -> list[str]:
    return [w for flag, values in _split_into_flags(argv) if flag != name for w in (f"--{flag}", *values)]


# ------------------------------------------------------------------------------------------------------- parsing


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


def keeps_casts(flags) -> bool:
    """Whether a run under autocast keeps 16-bit copies of its weights from one micro-batch to the next (sft/casts.py).

    Where a padded step would be one micro-batch, autocast casts once too and lets go before all gradients are there: copies that are
    kept could fill a card that the padded run does not. With gradient checkpointing memory is short, and compiled layers kept their
    activations (torch 2.11, benchmarks/LOG.md).
    """
    several = flags.gradient_accumulation_steps > 1 or flags.tokens_per_micro_batch != "auto"
    return flags.packing and several and not flags.gradient_checkpointing and not flags.torch_compile


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

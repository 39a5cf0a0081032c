"""Every flag once, the names of 2023 translated, contradictions refused, and how a run speaks to its user."""

import os
import sys
from dataclasses import dataclass, field

import transformers


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


def say(text: str) -> None:
    """Print once for the job (rank 0), at once."""
    if rank() == 0:
        print(text, file=sys.stdout, flush=True)


@dataclass
class ModelArguments:
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Model to tune: a folder, or a repository on the Hugging Face hub."}
    )
    trust_remote_code: bool = field(
        default=False,
        metadata={"help": "Run Python code that a model repository ships. Neither LLaMA nor XGen needs it here."},
    )
    attn_implementation: str | None = field(
        default=None,
        metadata={"help": "Attention kernel. Default: chosen for the device and said. One that lets packed examples see each other is refused."},
    )
    gpt2_files: str | None = field(
        default=None,
        metadata={"help": "XGen only: a folder with GPT-2's vocab.json and merges.txt, for machines where tiktoken cannot download them."},
    )


@dataclass
class DataArguments:
    data_path: str | None = field(default=None, metadata={"help": "CSV file with one training example in each row."})
    source: str = field(default="prompt", metadata={"help": "Column that holds the prompts."})
    target: str = field(default="response", metadata={"help": "Column that holds the responses."})
    prompt_template: str = field(
        default="none",
        metadata={"help": "'none': the source column is the whole prompt. 'alpaca': wrap it in the Alpaca prompt. Else a text file with one {instruction} in it."},
    )


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    model_max_length: int = field(
        default=512, metadata={"help": "Longest example in tokens, prompt and response together. Longer ones are cut and counted."}
    )
    packing: bool = field(
        default=True,
        metadata={"help": "Fill micro-batches with whole examples end to end: same examples and gradient in each optimizer step, no padding. False: padded."},
    )

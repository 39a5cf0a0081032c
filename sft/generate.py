"""Ask a tuned model, with the prompt template it was trained with.

    python -m sft.generate --model DIR --instruction "What is the capital of France?"
    python -m sft.generate --model DIR                                           # a chat of single turns
    python -m sft.generate --model DIR --base MODEL --instruction "..."          # the base model's answer beside it
    python -m sft.generate --model DIR --data_path in.csv --output_path out.csv  # one answer for each row

Answers go to stdout, everything else to stderr.
"""

import contextlib
import csv
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer
from transformers.utils import logging
from transformers.utils.hub import cached_file

from sft.data.checks import check_vocabulary
from sft.data.csv_rows import header_problems, read_csv
from sft.data.encode import encode_prompts
from sft.data.llama_tokenizer import load_llama_tokenizer
from sft.data.template import TEMPLATE_FILE, load_template
from sft.flags import ModelArguments, Parser, unknown_flags
from sft.job import UserError, one_message_for_user_errors

DESCRIPTION = "Ask a tuned model, with the prompt template it was trained with."


@dataclass
class GenerateArguments:
    """What to ask, and whom."""

    model: str = field(default="", metadata={"help": "The tuned model: its folder, or a hub repository."})
    instruction: str | None = field(
        default=None, metadata={"help": "One instruction. Without it and without --data_path: a chat of single turns."}
    )
    base: str | None = field(
        default=None,
        metadata={"help": "A model whose answer to the same prompt is shown beside it. Both are held in memory."},
    )
    prompt_template: str | None = field(
        default=None,
        metadata={
            "help": "'none', 'alpaca' or a text file with one {instruction} in it. Default: the template in the model's folder."
        },
    )
    max_new_tokens: int = field(
        default=512, metadata={"help": "Longest answer in tokens. Answers that are cut are counted."}
    )
    data_path: str = field(default="", metadata={"help": "CSV file with an instruction in each row."})
    source: str = field(default="prompt", metadata={"help": "Column that holds the instructions."})
    output_path: str = field(
        default="",
        metadata={"help": "CSV file to write: the same rows with a column `answer`, and `base_answer` with --base."},
    )
    batch_size: int = field(
        default=16, metadata={"help": "With --data_path: answers made at once. More is faster and takes more memory."}
    )


@dataclass
class TunedModel:
    """A model with its tokenizer and the template that turns an instruction into its prompt."""

    model: Any  # a PreTrainedModel, or peft's wrapper of one
    tokenizer: PreTrainedTokenizerBase
    template: str

    def prompts(self, instructions: list[str]) -> list[list[int]]:
        """The prompts' ids, exactly those of training."""
        texts = [self.template.replace("{instruction}", text) for text in instructions]
        return [ids.tolist() for ids in encode_prompts(self.tokenizer, texts)]


def load(name: str, prompt_template: str | None = None) -> TunedModel:
    """Load a tuned model, or a LoRA adapter on its base, from a folder or the hub.

    Args:
        prompt_template: 'none', 'alpaca' or a text file, instead of the template saved beside the model.

    Raises:
        UserError: no model there, no template, an adapter without its base, peft not installed.
    """
    config, adapter = find_file(name, "config.json"), find_file(name, "adapter_config.json")
    if not config and not adapter:
        checkpoints = sorted(path.name for path in Path(name).glob("checkpoint-*"))
        inside = f" It holds {', '.join(checkpoints)}: the run did not finish; resume it." if checkpoints else ""
        raise UserError(f"--model {name}: no model there (config.json or adapter_config.json).{inside}")
    template = load_template(prompt_template) if prompt_template else saved_template(name)
    with contextlib.redirect_stdout(sys.stderr):  # what the loaders say is no answer
        tokenizer = load_llama_tokenizer(
            ModelArguments(model_name_or_path=name), SimpleNamespace(model_max_length=int(1e30))
        )
        model = load_adapter(name) if adapter else load_weights(name)
    model.generation_config = GenerationConfig(  # greedy; sampling settings that the base model came with are dropped
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return TunedModel(model.eval(), tokenizer, template)


def find_file(name: str, file: str) -> str | None:
    """Local path of a file of the model (downloaded when the model is a hub repository), None if it has no such file."""
    if Path(name).is_dir():
        return str(Path(name, file)) if Path(name, file).is_file() else None
    if name.startswith((".", "/", "~")):
        raise UserError(f"--model {name}: no such folder.")
    try:
        return cached_file(name, file, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        raise UserError(f"--model {name}: no such folder, and not on the hub: {str(error).splitlines()[0]}") from error


def saved_template(name: str) -> str:
    path = find_file(name, TEMPLATE_FILE)
    if not path:
        raise UserError(
            f"--model {name}: no {TEMPLATE_FILE} there, so the prompts that it was trained with are not known. Give "
            "--prompt_template: 'none' (the instruction is the whole prompt), 'alpaca', or a text file with one {instruction}."
        )
    return load_template(path)


def load_weights(name: str) -> PreTrainedModel:
    """The weights in the type they are stored in, on the GPUs that are there, else on the CPU."""
    device_map = "auto" if torch.accelerator.is_available() else None
    try:
        return AutoModelForCausalLM.from_pretrained(name, dtype="auto", device_map=device_map)
    except (OSError, ValueError) as error:
        raise UserError(f"{name}: the model cannot be loaded: {str(error).strip().splitlines()[0]}") from error


def load_adapter(name: str) -> Any:
    try:
        from peft import PeftConfig, PeftModel
    except ImportError:
        raise UserError(f"--model {name}: a LoRA adapter, which needs peft: pip install peft") from None
    base = PeftConfig.from_pretrained(name).base_model_name_or_path
    try:
        model = load_weights(base)
    except UserError as error:
        raise UserError(
            f"--model {name}: an adapter for {base}, which is not there. Put that model back, or write its place "
            f"into adapter_config.json as base_model_name_or_path. ({error})"
        ) from error
    return PeftModel.from_pretrained(model, name)


def answer_batches(
    tuned: TunedModel, instructions: list[str], batch_size: int, max_new_tokens: int
) -> Iterator[tuple[int, str, bool]]:
    """Yield (index, answer, cut) for every instruction, the longest prompts first: what does not fit shows at once.

    Prompts are padded on the left, so that every answer starts in the same column. `cut`: the answer did not end
    within `max_new_tokens`.
    """
    prompts = tuned.prompts(instructions)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
    pad, eos = tuned.tokenizer.pad_token_id, tuned.tokenizer.eos_token_id
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        width = len(prompts[batch[0]])
        input_ids = torch.tensor([[pad] * (width - len(prompts[index])) + prompts[index] for index in batch])
        real = torch.tensor([[0] * (width - len(prompts[index])) + [1] * len(prompts[index]) for index in batch])
        device = tuned.model.device
        output = tuned.model.generate(
            input_ids=input_ids.to(device), attention_mask=real.to(device), max_new_tokens=max_new_tokens
        )
        for index, row in zip(batch, output[:, width:].tolist(), strict=True):
            ended = eos in row
            yield index, str(tuned.tokenizer.decode(row[: row.index(eos)] if ended else row)), not ended


def stream(tuned: TunedModel, instruction: str, max_new_tokens: int) -> None:
    """Print one answer while it is made."""
    input_ids = torch.tensor(tuned.prompts([instruction]), device=tuned.model.device)
    streamer = TextStreamer(tuned.tokenizer, skip_prompt=True, skip_special_tokens=True)
    output = tuned.model.generate(
        input_ids=input_ids,
        attention_mask=torch.ones_like(input_ids),
        max_new_tokens=max_new_tokens,
        streamer=streamer,
    )
    if output[0, -1] != tuned.tokenizer.eos_token_id:
        note(f"(cut after {max_new_tokens} tokens, --max_new_tokens)")


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def answer(models: dict[str, TunedModel], instruction: str, max_new_tokens: int) -> None:
    """Answer with each model; two models' answers are named."""
    for name, tuned in models.items():
        if len(models) > 1:
            print(f"{name}:", flush=True)
        stream(tuned, instruction, max_new_tokens)


def chat(models: dict[str, TunedModel], max_new_tokens: int) -> None:
    note("One instruction a line; each is answered by itself, without the ones before it. Ctrl-D ends.")
    while True:
        try:
            instruction = input("> " if sys.stdin.isatty() else "").strip()
            if instruction:
                answer(models, instruction, max_new_tokens)
        except (EOFError, KeyboardInterrupt):
            return


def answer_csv(models: dict[str, TunedModel], args: GenerateArguments) -> None:
    """Write the input's rows with a column more for each model: `answer`, and `base_answer` with --base."""
    instructions = [cell for _, cell, _ in read_csv(args.data_path, args.source, None)]
    with open(args.data_path, encoding="utf-8-sig", newline="") as file:
        header, *rows = csv.reader(file, strict=True)
    columns = {"base": "base_answer", "tuned": "answer"}
    if taken := [columns[name] for name in models if columns[name] in header]:
        raise UserError(f"{args.data_path}: it has a column {taken[0]!r} already. Rename or remove it.")
    asked = [index for index, text in enumerate(instructions) if text.strip()]
    if len(asked) < len(instructions):
        empty = len(instructions) - len(asked)
        note(f"{args.data_path}: {empty} of {len(instructions)} rows have an empty {args.source!r} and get no answer")
    for name, tuned in models.items():
        answers = [""] * len(rows)
        cut = 0
        batches = answer_batches(tuned, [instructions[i] for i in asked], args.batch_size, args.max_new_tokens)
        for position, text, was_cut in tqdm(batches, total=len(asked), desc=f"{name}: answers", disable=None):
            answers[asked[position]] = text
            cut += was_cut
        if cut:
            note(f"{name}: {cut} of {len(asked)} answers are cut after {args.max_new_tokens} tokens, --max_new_tokens")
        header.append(columns[name])
        rows = [[*row, text] if row else row for row, text in zip(rows, answers, strict=True)]
    with open(args.output_path, "w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([header, *rows])
    note(f"{args.output_path}: {len(asked)} answers")


def parse(argv: list[str] | None = None) -> GenerateArguments:
    parser = Parser((GenerateArguments,), prog="python -m sft.generate", description=DESCRIPTION, allow_abbrev=False)  # type: ignore[arg-type]
    flags, unknown = parser.parse_known_args(argv)
    problems = unknown_flags(parser, unknown)
    if not flags.model:
        problems.append("--model is missing: the tuned model, its folder or a hub repository.")
    if bool(flags.data_path) != bool(flags.output_path):
        problems.append("--data_path and --output_path go together: a CSV in, a CSV out.")
    if flags.data_path:
        problems += header_problems(flags.data_path, flags.source, None)
    if flags.data_path and flags.instruction is not None:
        problems.append("--instruction and --data_path are two kinds of questions. Give one of them.")
    if flags.instruction is not None and not flags.instruction.strip():
        problems.append("--instruction is empty. Leave the flag out for a chat.")
    if flags.output_path and Path(flags.output_path).exists():
        problems.append(f"--output_path {flags.output_path}: it exists. Name another file, or remove it.")
    elif flags.output_path and not Path(flags.output_path).resolve().parent.is_dir():
        problems.append(f"--output_path {flags.output_path}: no such folder. Make it first.")
    for name in ("max_new_tokens", "batch_size"):
        if getattr(flags, name) < 1:
            problems.append(f"--{name} {getattr(flags, name)}: it must be at least 1.")
    if problems:
        raise UserError(problems)
    return GenerateArguments(**vars(flags))


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    logging.disable_progress_bar()
    tuned = load(args.model, args.prompt_template)
    models = {"tuned": tuned}
    if args.base:
        base = load_weights(args.base)
        if problems := check_vocabulary(tuned.tokenizer, base.config):
            raise UserError([f"--base {args.base}: {problem}" for problem in problems])
        base.generation_config = tuned.model.generation_config
        models = {"base": TunedModel(base.eval(), tuned.tokenizer, tuned.template), **models}
    if args.data_path:
        answer_csv(models, args)
    elif args.instruction is not None:
        answer(models, args.instruction, args.max_new_tokens)
    else:
        chat(models, args.max_new_tokens)


if __name__ == "__main__":
    with one_message_for_user_errors():
        main()

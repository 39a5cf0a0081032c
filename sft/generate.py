"""Ask a tuned model, with the prompt template it was trained with.

    python -m sft.generate --model DIR --instruction "What is the capital of France?"
    python -m sft.generate --model DIR                                           # a chat of single turns
    python -m sft.generate --model DIR --base MODEL --instruction "..."          # the base model's answer next to it
    python -m sft.generate --model DIR --data_path in.csv --output_path out.csv  # one answer for each row

Answers go to stdout, everything else to stderr.
"""

import argparse
import contextlib
import csv
import difflib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
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
from sft.job import UserError, one_message_for_user_errors, printable
from sft.model.answer import greedy_answers

FLAGS: list[tuple[str, Any, str]] = [  # name, default, help
    ("model", "", "The tuned model: its folder, or a hub repository."),
    ("instruction", None, "One instruction. Without it and without --data_path: a chat of single turns."),
    ("base", None, "A model whose answer to the same prompt is shown next to it. Both are held in memory."),
    ("prompt_template", None, "'none', 'alpaca' or a text file with {instruction}. Default: the model folder's own."),
    ("max_new_tokens", 512, "Longest answer in tokens. Answers that are cut are counted."),
    ("data_path", "", "CSV file with an instruction in each row."),
    ("source", "prompt", "Column that holds the instructions."),
    ("output_path", "", "CSV file to write: the same rows with a column `answer`, and `base_answer` with --base."),
    ("batch_size", 16, "With --data_path: answers made at once. More is faster and takes more memory."),
]


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

    def answer(self, prompts: list[list[int]], longest: int, streamer: Any = None) -> list[tuple[list[int], bool]]:
        return greedy_answers(self.model, self.tokenizer, prompts, self.model.device, longest, streamer)


def load(name: str, prompt_template: str | None = None) -> TunedModel:
    """Load a tuned model, or a LoRA adapter on its base, with `prompt_template` or the template saved with it.

    Raises:
        UserError: no model there, no template, an adapter without its base, peft not installed.
    """
    config, adapter = find_file(name, "config.json"), find_file(name, "adapter_config.json")
    if not config and not adapter:
        checkpoints = sorted(path.name for path in Path(name).glob("checkpoint-*"))
        inside = f" It holds {', '.join(checkpoints)}: the run did not finish; resume it." if checkpoints else ""
        raise UserError(f"--model {name}: no model there (config.json or adapter_config.json).{inside}")
    template = load_template(prompt_template) if prompt_template else saved_template(name)
    with contextlib.redirect_stdout(sys.stderr):  # what the loaders print is no answer
        # not sft.flags: its TrainingArguments imports peft, and peft bitsandbytes, which warns on some CPUs
        source = SimpleNamespace(model_name_or_path=name, cache_dir=None, trust_remote_code=False)
        tokenizer = load_llama_tokenizer(source, SimpleNamespace(model_max_length=int(1e30)))
        model = load_adapter(name) if adapter else load_weights(name)
    model.generation_config = GenerationConfig()  # sampling settings that the base model came with are dropped
    return TunedModel(model.eval(), tokenizer, template)


def find_file(name: str, file: str) -> str | None:
    """Local path of a file of the model, downloaded if the model is a hub repository; None if it has no such file."""
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
    """Yield (index, answer, cut) for every instruction, the longest prompts first: what does not fit fails at once."""
    prompts = tuned.prompts(instructions)
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        answers = tuned.answer([prompts[index] for index in batch], max_new_tokens)
        for index, (ids, cut) in zip(batch, answers, strict=True):
            yield index, str(tuned.tokenizer.decode(ids)), cut


class Stream(TextStreamer):
    """Print an answer while it is made."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        print(printable(text), flush=True, end="\n" if stream_end else "")


def note(text: str) -> None:
    print(printable(text), file=sys.stderr, flush=True)


def answer(models: dict[str, TunedModel], instruction: str, max_new_tokens: int) -> None:
    """Answer with each model; two models' answers are named."""
    for name, tuned in models.items():
        if len(models) > 1:
            print(f"{name}:", flush=True)
        streamer = Stream(tuned.tokenizer, skip_prompt=True, skip_special_tokens=True)
        ((_, cut),) = tuned.answer(tuned.prompts([instruction]), max_new_tokens, streamer)
        if cut:
            note(f"(cut after {max_new_tokens} tokens, --max_new_tokens)")


def chat(models: dict[str, TunedModel], max_new_tokens: int) -> None:
    note("One instruction a line; each is answered by itself, without the ones before it. Ctrl-D ends.")
    while True:
        try:
            instruction = input("> " if sys.stdin.isatty() else "").strip()
            if instruction:
                answer(models, instruction, max_new_tokens)
        except (EOFError, KeyboardInterrupt):
            return


def answer_csv(models: dict[str, TunedModel], args: argparse.Namespace) -> None:
    """Write the input's rows with one more column for each model: `answer`, and `base_answer` with --base."""
    instructions = [cell for _, cell, _ in read_csv(args.data_path, args.source, None)]
    with open(args.data_path, encoding="utf-8-sig", newline="") as file:
        header, *rows = csv.reader(file, strict=True)
    columns = {"base": "base_answer", "tuned": "answer"}
    if taken := [columns[name] for name in models if columns[name] in header]:
        raise UserError(f"{args.data_path}: it has a column {taken[0]!r} already. Rename or remove it.")
    asked = [index for index, text in enumerate(instructions) if text.strip()]
    if empty := len(instructions) - len(asked):
        note(f"{args.data_path}: {empty} of {len(instructions)} rows have an empty {args.source!r} and get no answer")
    for name, tuned in models.items():
        answers, cut = [""] * len(rows), 0
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


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser("python -m sft.generate", allow_abbrev=False, formatter_class=formatter)
    parser.description = "Ask a tuned model, with the prompt template it was trained with."
    for name, default, help_text in FLAGS:
        spellings = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        parser.add_argument(*spellings, type=type(default or ""), default=default, metavar="VALUE", help=help_text)
    flags, unknown = parser.parse_known_args(argv)
    problems = []
    for word in [word for word in unknown if word.startswith("-")] or unknown:
        near = difflib.get_close_matches(word.split("=")[0].lstrip("-"), vars(flags), n=1)
        advice = (
            f"Did you mean --{near[0]}?" if near else "A value with spaces needs quotes; `--help` lists every flag."
        )
        problems.append(f"unknown flag {word}. {advice}")
    asked, given = flags.instruction is not None, flags.output_path
    mistakes = [
        (not flags.model, "--model is missing: the tuned model, its folder or a hub repository."),
        (bool(flags.data_path) != bool(given), "--data_path and --output_path go together: a CSV in, a CSV out."),
        (flags.data_path and asked, "--instruction and --data_path are two kinds of questions. Give one of them."),
        (asked and not flags.instruction.strip(), "--instruction is empty. Leave the flag out for a chat."),
        (given and Path(given).exists(), f"--output_path {given}: it exists. Name another file, or remove it."),
        (not Path(given).resolve().parent.is_dir(), f"--output_path {given}: no such folder. Make it first."),
        (flags.max_new_tokens < 1, f"--max_new_tokens {flags.max_new_tokens}: it must be at least 1."),
        (flags.batch_size < 1, f"--batch_size {flags.batch_size}: it must be at least 1."),
    ]
    problems += [message for wrong, message in mistakes if wrong]
    if flags.data_path:
        problems += header_problems(flags.data_path, flags.source, None)
    if problems:
        raise UserError(problems)
    return flags


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

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
import importlib.util
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase, TextStreamer
from transformers.utils import logging

from sft.data.checks import check_vocabulary
from sft.data.csv_rows import header_problems, read_csv
from sft.data.encode import encode_prompts
from sft.data.llama_tokenizer import load_llama_tokenizer
from sft.data.template import TEMPLATE_FILE, load_template
from sft.data.tokenizer_files import find_file
from sft.job import UserError, one_message_for_user_errors, printable
from sft.model.answer import greedy_answers
from sft.model.find import not_found

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

    def answers(self, texts: list[str], longest: int, size: int = 1, streamer=None) -> Iterator[tuple[int, str, bool]]:
        """Yield (index, answer, cut) for each instruction, the longest prompts first: what does not fit fails at once."""
        prompts = encode_prompts(self.tokenizer, [self.template.replace("{instruction}", text) for text in texts])
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            asked = [prompts[index].tolist() for index in batch]  # the ids of training
            made = greedy_answers(self.model, self.tokenizer, asked, self.model.device, longest, streamer)
            for index, (ids, cut) in zip(batch, made, strict=True):
                yield index, str(self.tokenizer.decode(ids)), cut


def load(name: str, prompt_template: str | None = None) -> TunedModel:
    """Load a tuned model, or a LoRA adapter on its base, with `prompt_template` or the template saved with it."""
    # not sft.flags: its TrainingArguments imports peft, and peft bitsandbytes, which warns on some CPUs
    source = SimpleNamespace(model_name_or_path=name, cache_dir=None, trust_remote_code=False)
    if missing := not_found(name, file=TEMPLATE_FILE):
        raise UserError(f"--model {missing}")
    config, adapter, saved = (find_file(source, f) for f in ("config.json", "adapter_config.json", TEMPLATE_FILE))
    if not config and not adapter:
        checkpoints = sorted(path.name for path in Path(name).glob("checkpoint-*"))
        inside = f" It holds {', '.join(checkpoints)}: the run did not finish; resume it." if checkpoints else ""
        raise UserError(f"--model {name}: no model there (config.json or adapter_config.json).{inside}")
    if not prompt_template and not saved:
        raise UserError(
            f"--model {name}: no {TEMPLATE_FILE} there, so the prompts that it was trained with are not known. Give "
            "--prompt_template: 'none' (the instruction is the whole prompt), 'alpaca', or a text file with one {instruction}."
        )
    template = load_template(prompt_template or saved)
    with contextlib.redirect_stdout(sys.stderr):  # what the loaders print is no answer
        tokenizer = load_llama_tokenizer(source)
        return TunedModel(load_weights(name, adapter), tokenizer, template)


def load_weights(name: str, adapter: str | None = None) -> Any:
    """The weights as stored, on the GPUs that are there, else on the CPU; under a LoRA adapter those that its config names."""
    if adapter and not importlib.util.find_spec("peft"):
        raise UserError(f"--model {name}: a LoRA adapter, which needs peft: pip install peft")
    base = json.loads(Path(adapter).read_text(encoding="utf-8"))["base_model_name_or_path"] if adapter else name
    device_map = "auto" if torch.accelerator.is_available() else None
    try:
        model = AutoModelForCausalLM.from_pretrained(base, dtype="auto", device_map=device_map)
    except (OSError, ValueError) as error:
        mend = (
            f"{name} is an adapter for it: put it back, or write its place into {adapter} as base_model_name_or_path."
        )
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{base}: the model cannot be loaded. {mend + ' ' if adapter else ''}({reason})") from error
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, name)
    model.generation_config = GenerationConfig()  # sampling settings that the model came with are dropped
    return model.eval()


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
        ((_, _, cut),) = tuned.answers([instruction], max_new_tokens, streamer=streamer)
        if cut:
            note(f"(cut after {max_new_tokens} tokens, --max_new_tokens)")


def chat(models: dict[str, TunedModel], max_new_tokens: int) -> None:
    note("One instruction a line; each is answered by itself, without the ones before it. Ctrl-D ends.")
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            if instruction := input("> " if sys.stdin.isatty() else "").strip():
                answer(models, instruction, max_new_tokens)


def answer_csv(models: dict[str, TunedModel], args: argparse.Namespace) -> None:
    """Write the input's rows with one more column for each model: `answer`, and `base_answer` with --base."""
    instructions = [cell for _, cell, _ in read_csv(args.data_path, args.source, None)]
    with open(args.data_path, encoding="utf-8-sig", newline="") as file:
        header, *rows = csv.reader(file, strict=True)
    columns = {"base": "base_answer", "tuned": "answer"}
    if taken := [columns[name] for name in models if columns[name] in header]:
        raise UserError(f"{args.data_path}: it has a column {taken[0]!r} already. Rename or remove it.")
    asked = [index for index, text in enumerate(instructions) if text.strip()]
    empty = len(instructions) - len(asked)
    note(f"{args.data_path}: {empty} of {len(instructions)} rows have an empty {args.source!r} and get no answer")
    for name, tuned in models.items():
        made = tuned.answers([instructions[index] for index in asked], args.max_new_tokens, args.batch_size)
        done = list(tqdm(made, total=len(asked), desc=f"{name}: answers", disable=None))
        answers, cut = {asked[position]: text for position, text, _ in done}, sum(cut for _, _, cut in done)
        note(f"{name}: {cut} of {len(asked)} answers are cut after {args.max_new_tokens} tokens, --max_new_tokens")
        header.append(columns[name])
        rows = [[*row, answers.get(index, "")] if row else row for index, row in enumerate(rows)]
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
        advice = f"Did you mean --{near[0]}?" if near else "A value with spaces needs quotes. See --help."
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
    problems += header_problems(flags.data_path, flags.source, None) if flags.data_path else []
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
        models = {"base": TunedModel(base, tuned.tokenizer, tuned.template), **models}
    if args.data_path:
        answer_csv(models, args)
    elif args.instruction is not None:
        answer(models, args.instruction, args.max_new_tokens)
    else:
        chat(models, args.max_new_tokens)


if __name__ == "__main__":
    with one_message_for_user_errors():
        main()

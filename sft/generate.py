"""Ask a tuned model, with the prompt template it was trained with.

    python -m sft.generate --model DIR --instruction "What is the capital of France?"
    python -m sft.generate --model DIR                                           # a chat
    python -m sft.generate --model DIR --base MODEL --instruction "..."          # the base model's answer next to it
    python -m sft.generate --model DIR --data_path in.csv --output_path out.csv  # one answer for each row

Answers go to stdout, everything else to stderr.
"""

import argparse
import contextlib
import csv
import difflib
import importlib.util
import io
import os
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedTokenizerBase, TextStreamer
from transformers.utils import logging

from sft.data.checks import check_vocabulary
from sft.data.conversations import Message, prompt_ids
from sft.data.encode import encode_prompts
from sft.data.files import header_problems, kind_of, read_rows
from sft.data.llama_tokenizer import load_llama_tokenizer
from sft.data.template import TEMPLATE_FILES, Template, load_template
from sft.data.tokenizer_files import find_file
from sft.job import UserError, complain, one_message_for_user_errors
from sft.model.answer import greedy_answers
from sft.model.find import not_found
from sft.model.safe_loads import safe_loads
from sft.outside import counted, printable, read_object, reading

FLAGS: list[tuple[str, Any, str]] = [  # name, default, help
    ("model", "", "The tuned model: its folder, or a hub repository."),
    ("instruction", None, "One instruction. Without it and without --data_path: a chat."),
    ("base", None, "A model whose answer to the same prompt is shown next to it. Both are held in memory."),
    ("prompt_template", None, "As in training. Default: the model folder's own."),
    ("system", "", "A system message before each question, where the template has a place for one."),
    ("max_new_tokens", 512, "Longest answer in tokens. Answers that are cut are counted."),
    ("data_path", "", "File with an instruction in each row: CSV, TSV, JSON, JSON lines or parquet."),
    ("source", "prompt", "Column that holds the instructions; other columns that the template names are read too."),
    (
        "output_path",
        "",
        "CSV file to write: the same rows (of JSON and parquet what the prompt reads) with a column of answers, and with --base a second one.",
    ),
    ("answer_column", "answer", "Name of that column; the base's is the same behind `base_`."),
    ("batch_size", 16, "With --data_path: answers made at once. More is faster and takes more memory."),
]


@dataclass
class TunedModel:
    """A model with its tokenizer and the template that turns an instruction, or a conversation, into its prompt."""

    model: Any  # a PreTrainedModel, or peft's wrapper of one
    tokenizer: PreTrainedTokenizerBase
    template: Template
    allow_control_tokens: bool = False  # as in the training
    system: str = ""  # message

    def conversation(self, *messages: Message) -> list[Message]:
        return [_message("system", self.system), *messages] if self.system else [*messages]

    def prompts(self, rows: list[dict[str, str]]) -> list[list[int]]:
        """The ids of each row's prompt, as training met them; a row has an `instruction` and what else the template names."""
        if self.template.forms:
            texts = [self.template.fill(row | ({"system": self.system} if self.system else {})) for row in rows]
            allowed = self.allow_control_tokens
            return [ids.tolist() for ids in encode_prompts(self.tokenizer, texts, allow_control_tokens=allowed)]
        return prompt_ids(
            self.tokenizer, self.template, [self.conversation(_message("user", row["instruction"])) for row in rows]
        )

    def answers(
        self, prompts: list[list[int]], longest: int, size: int = 1, streamer=None
    ) -> Iterator[tuple[int, str, bool]]:
        """Yield (index, answer, cut) for each prompt, the longest first: what does not fit fails at once."""
        order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
        for start in range(0, len(order), size):
            batch = order[start : start + size]
            asked = [prompts[index] for index in batch]
            made = greedy_answers(self.model, self.tokenizer, asked, self.model.device, longest, streamer)
            for index, (ids, cut) in zip(batch, made, strict=True):
                yield index, str(self.tokenizer.decode(ids)), cut


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def load(name: str, prompt_template: str | None = None, system: str = "") -> TunedModel:
    """Load a tuned model, or a LoRA adapter on its base, with `prompt_template` or the template saved with it."""
    # not sft.flags: its TrainingArguments imports peft, and peft bitsandbytes, which warns on some CPUs
    source = SimpleNamespace(model_name_or_path=name, cache_dir=None, trust_remote_code=False)
    if missing := not_found(name, file=TEMPLATE_FILES[0]):
        raise UserError(f"--model {missing}")
    config, adapter, *saved = (find_file(source, f) for f in ("config.json", "adapter_config.json", *TEMPLATE_FILES))
    if not config and not adapter:
        checkpoints = sorted(path.name for path in Path(name).glob("checkpoint-*"))
        inside = f" It holds {', '.join(checkpoints)}: the run did not finish; resume it." if checkpoints else ""
        raise UserError(f"--model {name}: no model there (config.json or adapter_config.json).{inside}")
    if not prompt_template and not any(saved):
        raise UserError(
            f"--model {name}: no {TEMPLATE_FILES[0]} there, so the prompts that it was trained with are not known. Give "
            "--prompt_template: 'none' (the instruction is the whole prompt), 'alpaca', 'chat', or a text file with {instruction}."
        )
    # what the loaders print is no answer, and of a tokenizer only its warnings matter here
    with contextlib.redirect_stdout(sys.stderr), reading(f"--model {name}: its files"):
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            tokenizer = load_llama_tokenizer(source)
        for line in printed.getvalue().splitlines():
            if line.startswith("warning"):
                complain(line)
        template = load_template(prompt_template or next(filter(None, saved)), tokenizer)
        if system and template.forms and "system" not in template.columns:
            raise UserError("--system: the model's template has no {system} in it. Leave the flag out.")
        allowed = allowed_control_tokens(find_file(source, "run_report.json"))
        return TunedModel(load_weights(name, adapter), tokenizer, template, allowed, system)


def allowed_control_tokens(record: str | None) -> bool:
    """Whether the training read control tokens in cells as such (--allow_control_tokens), as the record next to the model has it."""
    try:
        return bool(record) and bool(read_object(record)["flags"]["data"]["allow_control_tokens"])
    except (OSError, ValueError, KeyError, TypeError):
        complain(f"{record}: it cannot be read, so control tokens in an instruction are text")
        return False


def load_weights(name: str, adapter: str | None = None) -> Any:
    """The weights as stored, on the GPUs that are there, else on the CPU; under a LoRA adapter those that its config names."""
    if adapter and not importlib.util.find_spec("peft"):
        raise UserError(f"--model {name}: a LoRA adapter, which needs peft: pip install peft")
    base = read_object(adapter)["base_model_name_or_path"] if adapter else name
    device_map = "auto" if torch.accelerator.is_available() else None
    mend = f"{name} is an adapter for it: put it back, or write its place into {adapter} as base_model_name_or_path."
    if adapter and (missing := not_found(base)):
        raise UserError(f"{missing} {mend}")
    try:
        with safe_loads(base, deepspeed=False):
            model = AutoModelForCausalLM.from_pretrained(base, dtype="auto", device_map=device_map)
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, RuntimeError) as error:  # the last: PyTorch's, of a damaged pickle
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{base}: the model cannot be loaded. {mend + ' ' if adapter else ''}({reason})") from error
    if adapter:
        from peft import PeftModel

        with safe_loads(name, deepspeed=False):
            model = PeftModel.from_pretrained(model, name)
    model.generation_config = GenerationConfig()  # sampling settings that the model came with are dropped
    return model.eval()


class Stream(TextStreamer):
    """Print an answer while it is made."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        print(printable(text), flush=True, end="\n" if stream_end else "")


def answer(
    models: dict[str, TunedModel], conversations: dict[str, list[Message]], max_new_tokens: int
) -> dict[str, str]:
    """Print and return each model's answer to its own conversation; two models' answers are named."""
    made = {}
    for name, tuned in models.items():
        if len(models) > 1:
            print(f"{name}:", flush=True)
        streamer = Stream(tuned.tokenizer, skip_prompt=True, skip_special_tokens=True)
        messages = conversations[name]
        if tuned.template.holds_turns():
            prompts = prompt_ids(tuned.tokenizer, tuned.template, [tuned.conversation(*messages)])
        else:
            prompts = tuned.prompts(
                [dict.fromkeys(tuned.template.columns, "") | {"instruction": messages[-1]["content"]}]
            )
        ((_, made[name], cut),) = tuned.answers(prompts, max_new_tokens, streamer=streamer)
        if cut:
            complain(f"(cut after {max_new_tokens} tokens, --max_new_tokens)")
    return made


def read_instruction() -> str:
    """One line, or the lines between two of three quotes, or to the input's end. Raises EOFError where there is none."""
    line = input("> " if sys.stdin.isatty() else "").strip()
    if line != '"""':
        return line
    lines: list[str] = []
    with contextlib.suppress(EOFError):
        while (line := input("… " if sys.stdin.isatty() else "")).strip() != '"""':
            lines.append(line)
    return "\n".join(lines)


def chat(models: dict[str, TunedModel], max_new_tokens: int) -> None:
    """Answer what is typed, with what was said before where the template can hold it; Ctrl-C ends an answer or a line, not the chat."""
    holds_turns = models["tuned"].template.holds_turns()
    history: dict[str, list[Message]] = {name: [] for name in models}
    before = (
        "each sees what was said before; /new begins anew"
        if holds_turns
        else ("the template holds one question, so each is answered by itself, without the ones before it")
    )
    complain(f'One instruction a line, or several lines between two lines of """; {before}. Ctrl-D ends.')
    while True:
        try:
            instruction = read_instruction()
        except EOFError:
            return
        except KeyboardInterrupt:
            if not sys.stdin.isatty():
                return
            complain("\n(Ctrl-D ends)")
            continue
        if instruction == "/new" or not holds_turns:
            history = {name: [] for name in models}
        if instruction in ("", "/new"):
            continue
        asked = {name: [*messages, _message("user", instruction)] for name, messages in history.items()}
        try:
            made = answer(models, asked, max_new_tokens)
        except KeyboardInterrupt:
            complain("\n(interrupted; the question is forgotten)")
            continue
        history = {name: [*asked[name], _message("assistant", text)] for name, text in made.items()}


def asked_columns(source: str, template: Template) -> dict[str, str | None]:
    """The columns that make a prompt, each with what names it; None for one that may be missing."""
    columns: dict[str, str | None] = (
        {source: "--source"} if "instruction" in template.columns or not template.forms else {}
    )
    return columns | {
        name: f"{{{name}}} in the model's template" if needed else None
        for name, needed in template.columns.items()
        if name != "instruction"
    }


def answer_file(models: dict[str, TunedModel], args: argparse.Namespace) -> None:
    """Write the input's rows with one more column for each model."""
    names = asked_columns(args.source, models["tuned"].template)
    if args.system:
        names.pop("system", None)
    header, rows = [*names], [[*cells] for _, cells in read_rows(args.data_path, names, allow_numbers=True)]
    questions = [dict(zip(names, cells)) for cells in rows]
    questions = [cells | {"instruction": cells.get(args.source, "")} for cells in questions]
    if (kind := kind_of(args.data_path)) in ("csv", "tsv"):  # with the columns that the prompt does not read
        with open(args.data_path, encoding="utf-8-sig", newline="") as file:
            header, *rows = csv.reader(file, strict=True, delimiter="\t" if kind == "tsv" else ",")
    columns = {"base": f"base_{args.answer_column}", "tuned": args.answer_column}
    if taken := [columns[name] for name in models if columns[name] in header]:
        raise UserError(f"{args.data_path}: it has a column {taken[0]!r} already. Name another with --answer_column.")
    asked = [
        index for index, cells in enumerate(questions) if any(cells[name].strip() for name in names if names[name])
    ]
    empty = len(questions) - len(asked)
    complain(f"{args.data_path}: {empty} of {len(questions)} rows have an empty {args.source!r} and get no answer")
    answers: dict[str, dict[int, str]] = {name: {} for name in models}
    try:
        for name, tuned in models.items():
            prompts, cut = tuned.prompts([questions[index] for index in asked]), 0
            made = tuned.answers(prompts, args.max_new_tokens, args.batch_size)
            for position, text, is_cut in tqdm(made, total=len(asked), desc=f"{name}: answers", disable=None):
                answers[name][asked[position]] = text
                cut += is_cut
            complain(
                f"{name}: {cut} of {len(asked)} answers are cut after {args.max_new_tokens} tokens, --max_new_tokens"
            )
    finally:  # after Ctrl-C and errors too: answers take hours
        count = max(map(len, answers.values()))
        if count or not asked:
            found = [[answers[name].get(index, "") for name in models] for index in range(len(rows))]
            rows = [row + new if row else row for row, new in zip(rows, found)]
            write_csv(args.output_path, [header + [columns[name] for name in models], *rows])
            complain(f"{args.output_path}: {counted(count, 'answer')}")


def write_csv(path: str, rows: list[list[str]]) -> None:
    """Write a CSV. Raises UserError where it cannot be written, with its place in the folder for temporary files."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(rows)
    try:
        Path(path).write_text(text.getvalue(), "utf-8", newline="")
    except OSError as error:
        instead = Path(tempfile.mkdtemp(), Path(path).name)
        instead.write_text(text.getvalue(), "utf-8", newline="")
        raise UserError(f"{path}: it cannot be written ({error}). The answers are in {instead}.") from error


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    formatter = argparse.ArgumentDefaultsHelpFormatter
    parser = argparse.ArgumentParser("python -m sft.generate", allow_abbrev=False, formatter_class=formatter)
    parser.description = "Ask a tuned model, with the prompt template it was trained with."
    for name, default, help_text in FLAGS:
        spellings = dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}"))
        parser.add_argument(*spellings, type=type(default or ""), default=default, metavar="VALUE", help=help_text)
    parser.add_argument("--chat", action="store_true", help="A chat, as without --instruction and --data_path.")
    flags, unknown = parser.parse_known_args(argv)
    problems = []
    for word in [word for word in unknown if word.startswith("-")] or unknown:
        near = difflib.get_close_matches(word.split("=")[0].lstrip("-"), vars(flags), n=1)
        advice = f"Did you mean --{near[0]}?" if near else "A value with spaces needs quotes. See --help."
        problems.append(f"unknown flag {word}. {advice}")
    asked, given = flags.instruction is not None, flags.output_path
    folder = Path(given).resolve().parent
    mistakes = [
        (not flags.model, "--model is missing: the tuned model, its folder or a hub repository."),
        (bool(flags.data_path) != bool(given), "--data_path and --output_path go together: a file in, a CSV out."),
        (flags.data_path and asked, "--instruction and --data_path are two kinds of questions. Give one of them."),
        (flags.chat and (asked or flags.data_path), "--chat goes without --instruction and --data_path."),
        (asked and not flags.instruction.strip(), "--instruction is empty. Leave the flag out for a chat."),
        (given and Path(given).exists(), f"--output_path {given}: it exists. Name another file, or remove it."),
        (not folder.is_dir(), f"--output_path {given}: no such folder. Make it first."),
        (
            folder.is_dir() and not os.access(folder, os.W_OK),
            f"--output_path {given}: its folder cannot be written to. Name another.",
        ),
        (flags.max_new_tokens < 1, f"--max_new_tokens {flags.max_new_tokens}: it must be at least 1."),
        (flags.batch_size < 1, f"--batch_size {flags.batch_size}: it must be at least 1."),
    ]
    problems += [message for wrong, message in mistakes if wrong]
    if flags.data_path:
        problems += header_problems(flags.data_path, {flags.source: "--source"}, True, True)
    if problems:
        raise UserError(problems)
    return flags


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    logging.disable_progress_bar()
    tuned = load(args.model, args.prompt_template, args.system)
    models = {"tuned": tuned}
    if args.base:
        with reading(f"--base {args.base}: its files"):
            base = load_weights(args.base)
        if problems := check_vocabulary(tuned.tokenizer, base.config):
            raise UserError([f"--base {args.base}: {problem}" for problem in problems])
        models = {"base": replace(tuned, model=base), **models}
    if args.data_path:
        answer_file(models, args)
    elif args.instruction is not None:
        answer(models, {name: [_message("user", args.instruction)] for name in models}, args.max_new_tokens)
    else:
        chat(models, args.max_new_tokens)


if __name__ == "__main__":
    with one_message_for_user_errors():
        main()

"""A row as segments, in order: texts that are read, trained, read, trained, … A prompt and its response are one of each."""

from typing import TYPE_CHECKING, Any

from sft.data.conversations import Segments, read_messages, split_turns, trained_turns
from sft.data.csv_rows import PROBLEMS_SHOWN
from sft.data.encode import control_tokens
from sft.data.template import Template, load_template
from sft.data.token_cache import EMPTY
from sft.job import UserError

if TYPE_CHECKING:  # the commands read tokenizers without the Trainer's arguments, which import peft and bitsandbytes
    from sft.flags import DataArguments


def columns_of(data_args: "DataArguments", template: Template) -> dict[str, str | None]:
    """The columns that a run reads, each with what names it; None for one that a row may lack."""
    if data_args.messages:
        return {data_args.messages: "--messages"}
    columns: dict[str, str | None] = {}
    if not template.forms or "instruction" in template.columns:
        columns[data_args.source] = "--source"
    for name, needed in template.columns.items():
        if name != "instruction":
            columns.setdefault(name, f"{{{name}}} in --prompt_template {template.name}" if needed else None)
    return columns | {data_args.target: "--target"}


class Rows:
    """How the rows of a run's files become segments, by its flags and its tokenizer's template.

    Attributes:
        how: what `read_rows` must know: columns, whether their cells are texts, whether numbers are.
        rendered: what `encode_segments` must know of a template's rendering; nothing where rows are filled into a text.
    """

    def __init__(self, data_args: "DataArguments", tokenizer: Any):
        self.data_args, self.tokenizer = data_args, tokenizer
        self.template = load_template(data_args.prompt_template, tokenizer, bool(data_args.messages))
        self.columns = columns_of(data_args, self.template)
        self.how = (self.columns, not data_args.messages, data_args.allow_numbers)
        if data_args.messages and not self.template.jinja:
            raise UserError(
                f"--prompt_template {self.template.name}: a conversation has no place for the columns that it names."
            )
        self.rendered: dict[str, bool] = {}
        if data_args.messages or not self.template.forms:
            self.rendered = {"rendered": True, "bos": not self.template.begins_with_bos}
            if not tokenizer.is_fast:
                raise UserError(
                    "conversations and chat templates need a fast tokenizer: a model with a tokenizer.json."
                )

    def key(self) -> dict[str, Any]:
        """What decides the segments, for the cache."""
        flags, template = self.data_args, [*self.template.forms] or self.template.jinja
        key = {"columns": list(self.columns), "allow_numbers": flags.allow_numbers, "template": template}
        return key | ({"messages": flags.messages, "train_on": flags.train_on} if flags.messages else {})

    def segments(self, path: str, batch: list[tuple[int, tuple]]) -> list[Segments | int]:
        """The segments of each row, or what became of a row without any."""
        if self.rendered:
            turns = [(f"{path}, row {number}", cells) for number, cells in batch]
            flags = self.data_args
            rows = _read(turns) if flags.messages else [(where, self._messages(cells)) for where, cells in turns]
            return split_turns(rows, self.tokenizer, self.template, flags.train_on, flags.allow_control_tokens)
        return [self._pair(cells) for _, cells in batch]

    def texts(self, where: str, cells: tuple) -> tuple[str, str, str]:
        """(all that is read before the first answer, the questions, the answers) of a row, for the audit."""
        if self.data_args.messages:
            messages = read_messages(cells[0], where)
            turn = trained_turns(messages, self.data_args.train_on)[0]
            answers = [message["content"] for message in messages if message["role"] == "assistant"]
            questions = [message["content"] for message in messages if message["role"] != "assistant"]
            return repr(messages[:turn]), "\n".join(questions), "\n".join(answers)
        named = dict(zip(self.columns, cells))
        question, answer = named.get(self.data_args.source, ""), named[self.data_args.target]
        pair = self._pair(cells) if self.template.forms else [question, answer]
        return (pair if isinstance(pair, list) else [""])[0], question, answer

    def _pair(self, row: tuple[str, ...]) -> Segments | int:
        cells = dict(zip(self.columns, row))
        answer = cells[self.data_args.target]
        if "instruction" in self.template.columns:
            question = cells["instruction"] = cells[self.data_args.source]
        else:
            question = "".join(cells[name] for name in self.template.columns)
        return [self.template.fill(cells), answer] if question.strip() and answer.strip() else EMPTY

    def _messages(self, row: tuple[str, ...]) -> list[dict[str, Any]]:
        cells = dict(zip(self.columns, row))
        texts = {"user": cells[self.data_args.source], "assistant": cells[self.data_args.target]}
        return [{"role": role, "content": text} for role, text in texts.items()]

    def plain_texts(self, rows: list[Segments | int]) -> list[str]:
        """The texts of the segments; of a rendering those without control tokens."""
        texts = [text for part in (0, 1) for row in rows if isinstance(row, list) for text in row[part::2]]
        control = control_tokens(self.tokenizer)
        return [text for text in texts if not control.search(text)] if self.rendered else texts


def _read(turns: list[tuple[str, tuple]]) -> list[tuple[str, list[dict[str, Any]]]]:
    rows, problems = [], []
    for where, (cell,) in turns:
        try:
            rows.append((where, read_messages(cell, where)))
        except UserError as error:
            problems += error.problems
    if problems:
        raise UserError(problems[:PROBLEMS_SHOWN])
    return rows

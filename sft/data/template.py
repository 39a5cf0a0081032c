"""Put a row into its prompt: the same text in training, in evaluation and when the tuned model is asked.

A template is text with columns in it, or Jinja over a conversation, and every template has a Jinja form. Text templates are
filled without Jinja, which is ten times as fast; a test compares the two.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from sft.job import UserError

TEMPLATE_FILES = ("prompt_template.txt", "prompt_template.jinja")  # the template, next to the exported model
_ALPACA_BEGIN = "Below is an instruction that describes a task"  # stanford_alpaca, train.py, PROMPT_DICT
_ALPACA_TASK = "Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}\n\n"
ALPACA_TEMPLATE = f"{_ALPACA_BEGIN}. {_ALPACA_TASK}### Response:"
ALPACA_INPUT_TEMPLATE = f"{_ALPACA_BEGIN}, paired with an input that provides further context. {_ALPACA_TASK}### Input:\n{{input}}\n\n### Response:"
TURNS_TEMPLATE = """\
{%- for message in messages -%}
    {{- "### " + message["role"].capitalize() + ":\\n" -}}
    {%- if message["role"] == "assistant" -%}
        {%- generation -%}{{- message["content"] + eos_token -}}{%- endgeneration -%}
    {%- else -%}
        {{- message["content"] -}}
    {%- endif -%}
    {{- "\\n\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "### Assistant:\\n" -}}{%- endif -%}
"""
NAMES = "Give 'none', 'alpaca', 'turns', 'chat', a text file, or a .jinja file."
PLACE = re.compile(r"\{\{([A-Za-z_]\w*)\}\}|\{([A-Za-z_]\w*)\}")  # {{word}} is the text {word}; {word} is a column


@dataclass(frozen=True)
class Template:
    """How a row becomes what the model reads.

    Args:
        forms: texts with {columns}; the first one whose optional columns are all filled is used. None of Jinja.
        jinja: the same for a conversation, as tokenizers keep it; "" where a conversation has no place in it, or where it is the
            tokenizer's own, not known yet.
        begins_with_bos: its rendering has the BOS that it needs; other templates leave that to the tokenizer.
        control_tokens: one that it, or a cell, spells is read as the token (--allow_control_tokens), as every chat client reads it.
    """

    name: str
    forms: tuple[str, ...] = ()
    jinja: str = ""
    begins_with_bos: bool = False
    control_tokens: bool = False

    @property
    def text(self) -> str:
        """What is saved, and compared when a run is resumed."""
        return self.forms[-1] if self.forms else self.jinja

    @property
    def file_name(self) -> str:
        return TEMPLATE_FILES[0 if self.forms else 1]

    @cached_property
    def columns(self) -> dict[str, bool]:
        """Each column that the text names, and whether every form does: others may be missing or empty."""
        named = [[match[2] for match in PLACE.finditer(form) if match[2]] for form in self.forms]
        return {name: all(name in names for names in named) for names in reversed(named) for name in names}

    @cached_property
    def _parts(self) -> list[list[str]]:
        """Each form as texts and, at every second place, columns."""
        return [split_form(form) for form in self.forms]

    def fill(self, cells: Mapping[str, str]) -> str:
        """The prompt of a row, by the names of its cells."""
        for parts in self._parts:
            if all(self.columns[name] or cells[name].strip() for name in parts[1::2]):
                break
        return "".join([cells[part] if place % 2 else part for place, part in enumerate(parts)])

    def holds_turns(self) -> bool:
        """Whether a second question can follow the first answer."""
        return not self.forms


def split_form(form: str) -> list[str]:
    """A form as texts and, at every second place, columns."""
    parts, at = [""], 0
    for match in PLACE.finditer(form):
        parts[-1] += form[at : match.start()]
        at = match.end()
        if match[2]:
            parts += [match[2], ""]
        else:
            parts[-1] += match[0][1:-1]
    parts[-1] += form[at:]
    return parts


def load_template(prompt_template: str, tokenizer: Any = None, conversations: bool = False) -> Template:
    """The template of 'none', 'alpaca', 'turns', 'chat', or the path of a text or a .jinja file.

    Args:
        tokenizer: has the template that 'chat' is. Without one its Jinja stays empty.
        conversations: rows are conversations, which 'none' does not hold: it is the tokenizer's own template then, else 'turns'.
    """
    name = prompt_template
    if name == "none" and conversations:
        name = "chat" if tokenizer is None or tokenizer.chat_template else "turns"
    if name == "chat":
        own = getattr(tokenizer, "chat_template", "")
        if own is None:
            raise UserError(
                "--prompt_template chat: the tokenizer has no chat template. Give 'turns', which needs no token of its own, or a .jinja file."
            )
        return Template(name, jinja=own, begins_with_bos=True)
    if name == "turns":
        return Template(name, jinja=TURNS_TEMPLATE)
    if name == "alpaca":
        return filled(name, ALPACA_INPUT_TEMPLATE, ALPACA_TEMPLATE)
    text = "{instruction}" if name == "none" else _read(name)
    if Path(name).name in TEMPLATE_FILES and text in (ALPACA_TEMPLATE, TURNS_TEMPLATE):  # saved next to a model
        return load_template("alpaca" if text == ALPACA_TEMPLATE else "turns")
    if Path(name).name not in TEMPLATE_FILES:  # a saved one is what was trained, letter by letter
        text = text.removeprefix("\ufeff").replace("\r\n", "\n")  # of Windows editors: no model was meant to read them
    if name.endswith(".jinja"):
        return Template(name, jinja=text, begins_with_bos=True)
    template = filled(name, text)
    if not template.columns:
        raise UserError(
            f"--prompt_template {name}: no column stands in it. Write {{instruction}} where the source column's text belongs, or the names of other columns."
        )
    return template


def filled(name: str, *forms: str) -> Template:
    """A template of texts with {columns}."""
    return Template(name, forms, chat_template(*forms))


def _read(path: str) -> str:
    try:
        return Path(path).read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise UserError(f"--prompt_template {path}: {reason}. {NAMES}") from None


CHAT_TEMPLATE = """\
{%- if tools %}{{ raise_exception("This model was trained without tools.") }}{% endif -%}
{%- set system = "" -%}
{%- if SYSTEM and messages[0]["role"] == "system" -%}
    {%- set system = messages[0]["content"] -%}
    {%- set messages = messages[1:] -%}
{%- endif -%}
{%- for message in messages -%}
    {%- if loop.first and message["role"] == "user" -%}
        PROMPT
    {%- elif loop.index == 2 and message["role"] == "assistant" -%}
        {%- generation -%}{{- message["content"] + eos_token -}}{%- endgeneration -%}
    {%- else -%}
        {{- raise_exception("This model was trained on one instruction and its answer: it takes one user message, no system message and no second turn.") -}}
    {%- endif -%}
{%- endfor -%}
"""


def chat_template(*forms: str) -> str:
    """The Jinja text that renders a user's message as the template's prompt, and an assistant's as the answer with its EOS.

    The message is the {instruction}, or the only column; {system} is the system message, and other columns are variables of
    the rendering; "" where the prompt needs such a one. Without BOS, which depends on the tokenizer. A role or turn that training
    never saw is refused.
    """
    template = Template("", forms)
    others = [name for name in template.columns if name != "system"]
    main = "instruction" if "instruction" in others or not others else others[0]
    if any(name != main and template.columns[name] for name in others):
        return ""
    prompt = ""
    for form in forms:
        parts = split_form(form)
        optional = [name for name in parts[1::2] if not template.columns[name]]
        if optional:
            prompt += "{%- if " + " and ".join(f"{name} and {name}.strip()" for name in optional) + " -%}"
        terms = [
            json.dumps(part, ensure_ascii=False) if place % 2 == 0 else 'message["content"]' if part == main else part
            for place, part in enumerate(parts)
            if part
        ]
        prompt += "{{- " + " + ".join(terms) + " -}}" + ("{%- else -%}" if optional else "")
    prompt += "{%- endif -%}" * (len(forms) - 1)
    text = CHAT_TEMPLATE.replace("PROMPT", prompt)
    if "system" in template.columns:
        return text.replace("SYSTEM and ", "").replace(", no system message", ", after a system message")
    return re.sub(r"\{%- set system.*?endif -%\}\n", "", text, flags=re.DOTALL)

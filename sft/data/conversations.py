"""Turn conversations into what is read and what is trained, as generation will meet it, turn by turn.

The text before each trained answer is the template's rendering of the messages before it, with the generation prompt; the answer
is what the rendering of one message more adds to that. Where a later rendering no longer begins with the ones before (templates
that drop earlier reasoning), no single text holds what generation meets at each turn, and the row is not trained on.
"""

import json
from typing import Any

from jinja2 import TemplateError

from sft.data.csv_rows import PROBLEMS_SHOWN
from sft.data.encode import encode_rendered, guard
from sft.data.files import RepeatedKey, bad_text, unique
from sft.data.template import Template
from sft.data.token_cache import DISAGREED, EMPTY
from sft.job import UserError

ROLES = {role: role for role in ("system", "user", "assistant", "tool")} | {"human": "user", "gpt": "assistant"}
SWITCHES = ("train", "loss_mask", "weight")  # of a message: false or 0 keeps an answer from being trained

Message = dict[str, Any]
Segments = list[str]  # texts that are read, trained, read, trained, …; an answer's EOS is left to the tokenizer


def read_messages(cell: Any, where: str) -> list[Message]:
    """A conversation's messages as {"role", "content"} and what else the template may show; none for an empty cell.

    Takes {"from", "value"} too, and JSON text. Raises UserError with every fault.
    """
    if isinstance(cell, str) and cell.strip():
        try:
            cell = json.loads(cell, object_pairs_hook=unique)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not a conversation in JSON: {error}.") from None
    if cell is None or cell == "" or cell == []:
        return []
    if not isinstance(cell, list):
        raise UserError(f'{where}: a {type(cell).__name__}, not a list of {{"role", "content"}}.')
    messages, problems = [], []
    for number, entry in enumerate(cell, 1):
        message = {key: value for key, value in entry.items() if value is not None} if isinstance(entry, dict) else {}
        role, content = (message.pop(a, message.pop(b, None)) for a, b in (("role", "from"), ("content", "value")))
        known = ROLES.get(role) if isinstance(role, str) else None
        fault = None
        if isinstance(entry, RepeatedKey):
            fault = str(entry).removesuffix(".")
        elif role is None:
            fault = "no role"
        elif known is None:
            fault = f"the role {role!r} is unknown. Known are {', '.join(ROLES)}"
        elif not isinstance(content, str):
            fault = "no content" if content is None else f"its content is a {type(content).__name__}, not text"
        elif bad := bad_text(content):
            fault = bad.removesuffix(".")
        for switch in SWITCHES:
            if message.get(switch, 1) not in (0, 1):
                fault = f"{switch} is {message[switch]!r}. Give true or false"
        if fault:
            problems.append(f"{where}, message {number}: {fault}.")
        messages.append({"role": known, "content": content, **message})
    if not problems and messages[-1]["role"] != "assistant":
        problems = [
            f"{where}: it ends with a message of the {messages[-1]['role']}, which nothing answers. Remove it, or add the answer."
        ]
    if problems:
        raise UserError(problems)
    return messages


def trained_turns(messages: list[Message], train_on: str) -> list[int]:
    """Positions of the answers that are trained: all of them or the last one, but for those that a message's own switch leaves out."""
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    chosen = answers[-1:] if train_on == "last" else answers
    return [index for index in chosen if all(messages[index].get(switch, 1) for switch in SWITCHES)]


def render(
    tokenizer: Any, template: Template, conversations: list[list[Message]], prompts: bool, control: bool
) -> list[str]:
    """Each conversation as text, with the generation prompt where it is a prompt. In contents, control tokens' texts are guarded."""
    if not control:
        conversations = [
            [message | {"content": guard(tokenizer, message["content"])} for message in messages]
            for messages in conversations
        ]
    options = {"chat_template": template.jinja, "tokenize": False, "add_generation_prompt": prompts}
    return tokenizer.apply_chat_template(conversations, **options) if conversations else []


def split_turns(
    rows: list[tuple[str, list[Message]]], tokenizer: Any, template: Template, train_on: str, allow_control_tokens: bool
) -> list[Segments | int]:
    """The segments of each conversation, or why it has none: EMPTY or DISAGREED.

    Args:
        rows: (where, messages). An empty question or answer drops the whole conversation, as it drops a pair.
    """
    turns = [
        trained_turns(messages, train_on)
        if all(m["content"].strip() for m in messages if m["role"] != "system")
        else []
        for _, messages in rows
    ]
    cuts = [(messages, turn) for (_, messages), at in zip(rows, turns) for turn in at]
    try:
        before = render(tokenizer, template, [messages[:turn] for messages, turn in cuts], True, allow_control_tokens)
        after = render(
            tokenizer, template, [messages[: turn + 1] for messages, turn in cuts], False, allow_control_tokens
        )
    except (TemplateError, TypeError, ValueError) as error:
        if len(rows) == 1:
            raise UserError(f"{rows[0][0]}: the chat template refuses it: {error}") from None
        return _one_by_one(rows, tokenizer, template, train_on, allow_control_tokens)
    found: list[Segments | int] = []
    renderings = iter(zip(before, after))
    for at in turns:
        found.append(_segments([next(renderings) for _ in at], tokenizer.eos_token, template.name) if at else EMPTY)
    return found


def _segments(renderings: list[tuple[str, str]], eos: str, name: str) -> Segments | int:
    """The segments of a conversation, from the rendering before each trained answer and with it."""
    segments, text = [], ""
    for before, after in renderings:
        if not before.startswith(text) or not after.startswith(before):
            return DISAGREED
        answer, end, _ = after[len(before) :].rpartition(eos)
        if not end:
            raise UserError(
                f"--prompt_template {name}: it does not end an answer with the tokenizer's EOS {eos!r}, so the model would not learn to "
                f"stop: the rendering ends in {after[-20:]!r}. Put {{{{ eos_token }}}} behind the answer, or name the right eos_token in "
                "tokenizer_config.json."
            )
        segments += [before[len(text) :], answer]
        text = before + answer + end
    return segments


def _one_by_one(rows: list, *how: Any) -> list[Segments | int]:
    """The template refuses one of the rows: find all that it refuses, and give each reason once."""
    refused: dict[str, list[str]] = {}  # why -> the numbers of the rows
    for row in rows:
        try:
            split_turns([row], *how)
        except UserError as error:
            refused.setdefault(error.problems[0].removeprefix(row[0]), []).append(row[0].rpartition(" ")[2])
    problems = []
    for why, numbers in refused.items():
        where = f"{rows[0][0].rpartition(' ')[0]}{'s' * (len(numbers) > 1)} {', '.join(numbers[:PROBLEMS_SHOWN])}"
        problems.append(f"{where}{', …' * (len(numbers) > PROBLEMS_SHOWN)}{why}" if why[0] == ":" else why)
    raise UserError(problems[:PROBLEMS_SHOWN])


def prompt_ids(tokenizer: Any, template: Template, conversations: list[list[Message]]) -> list[list[int]]:
    """The ids with which generation begins, as training met them, for conversations that end with a question."""
    texts = render(tokenizer, template, conversations, prompts=True, control=False)
    bos = not template.begins_with_bos
    return [ids.tolist() for ids in encode_rendered(tokenizer, "prompt", texts, bos)]

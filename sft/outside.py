"""Take what comes from outside: texts made printable, secrets left out, files that may hold anything."""

import json
import os
import pickle
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from safetensors import SafetensorError


class UserError(Exception):
    """A mistake that the user can mend: what is wrong, where, and what to do.

    The entry scripts end it in one message on stderr, no traceback, and exit code 2 from every rank.
    """

    def __init__(self, problems: str | list[str]):
        self.problems = [problems] if isinstance(problems, str) else list(dict.fromkeys(problems))
        super().__init__("\n".join(self.problems))


INVISIBLE = "\n\t\u00a0\u2007\u202f\u3000\u200c\u200d"  # line feeds, tabs, spaces and joiners that texts need


def printable(text: str) -> str:
    """Spell out what could steer a terminal; whatever comes from data, a model or a path is printed through this."""
    return "".join(c if c.isprintable() or c in INVISIBLE else repr(c)[1:-1] for c in text)


def counted(number: int, noun: str) -> str:
    """(1, "row") -> "1 row"; (1200, "row") -> "1,200 rows\""""
    return f"{number:,} {noun}{'s' * (number != 1)}"


SECRET_WORDS = {"token", "key", "apikey", "secret", "password", "passwd", "credential", "credentials"}


def is_secret(name: str) -> bool:
    """hub_token, WANDB_API_KEY -> True; tokens_per_micro_batch, tokenizer -> False"""
    return not SECRET_WORDS.isdisjoint(re.split(r"[^a-z]+", name.lower()))


def without_password(text: str, instead: str = "***") -> str:
    """https://me:secret@host/file.csv -> https://***@host/file.csv"""
    return re.sub(r"(?<=://)[^/@\s]+(?=@)", instead, text)


def read_object(path: str | os.PathLike) -> dict[str, Any]:
    """The object that a JSON file holds. OSError: it cannot be read; ValueError: it holds something else."""
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError(f"it holds a {type(found).__name__}, not an object")
    return found


FILE_ERRORS: tuple[type[Exception], ...] = (OSError, ValueError, TypeError, LookupError, AttributeError)
FILE_ERRORS += (RecursionError, EOFError, pickle.UnpicklingError, SafetensorError)


@contextmanager
def reading(what: str) -> Iterator[None]:
    """End in a sentence whatever a library raises while it reads files of others: each has errors of its own for a damaged one."""
    try:
        yield
    except FILE_ERRORS as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise UserError(f"{what} cannot be loaded: {type(error).__name__}: {reason[:300]}") from error

"""Encode texts word by word, each different word once, for tokenizers whose tokens never span two words."""

import json
from array import array
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import numpy as np
from tokenizers import Tokenizer
from tokenizers.models import BPE

SPACE = "▁"  # U+2581, how SentencePiece writes a space
LEADING_SPACE, RUN_OF_SPACES, LAST_SPACES = r"\A ", " {2,}", rf"[ {SPACE}]+\z"


class Words:
    """Ids of words that were seen before: nearly all words of a text stood in an earlier one.

        "the river runs" -> ids of "the" where a text begins, of "▁river", of "▁runs"

    For tokenizers like LLaMA's and Mistral's, whose words `stand_alone`: a BPE without a piece that has a space behind another
    character, so that no token spans two words, and before it no other step than that spaces become ▁, and a prefix.
    """

    MOST_KEPT = 2**17  # words, about 30 MB
    LONGEST = 16  # characters, on average; what is written without spaces (Chinese, base64) does not come again

    def __init__(self, encoder: Tokenizer):
        model, vocab = encoder.model, encoder.get_vocab(with_added_tokens=False)
        parts = filter(None, parts_before_model(encoder).values())
        steps = [step for part in parts for step in part.get("normalizers") or part.get("pretokenizers") or [part]]
        about_spaces = [{"String": " "}, {"Regex": RUN_OF_SPACES}, {"Regex": LAST_SPACES}]
        self.stand_alone = (
            isinstance(model, BPE)
            and not any((model.dropout, model.ignore_merges, model.continuing_subword_prefix, model.end_of_word_suffix))
            and SPACE in vocab
            and not any(SPACE in piece.lstrip(SPACE) for piece in vocab)
            and all(token.special for token in encoder.get_added_tokens_decoder().values())  # they are text here
            and any(SPACE in (step.get("content"), step.get("replacement")) for step in steps)
            and all(step["type"] == "Metaspace" or step.get("pattern") in about_spaces for step in steps)
        )
        self.encoder = encoder
        self.begins_word = np.zeros(max(vocab.values(), default=0) + 1, bool)  # by id
        self.begins_word[[i for piece, i in vocab.items() if piece.startswith(SPACE)]] = True
        self.ids = _Ids()

    def encode(self, texts: list[str], encode_whole: Callable[[list[str]], list[array]], use: tuple) -> list[array]:
        """Ids of each text: word by word where single spaces separate its words, by `encode_whole` elsewhere."""
        rows = [self._split(text, use) for text in texts]
        if len(self.ids) > self.MOST_KEPT:
            self.ids = _Ids()
        ids, new = self.ids, defaultdict[Any, bytearray](bytearray)
        joined = [ids.of(words, new) for words in rows]
        if words := [word for word in new if isinstance(word, str)]:
            self._learn(words, new)
        if firsts := [word for word in new if not isinstance(word, str)]:
            for first, word_ids in zip(firsts, encode_whole([word for _, word in firsts])):
                new[first] += word_ids.tobytes()
        ids.update((word, bytes(found)) for word, found in new.items())
        others = iter(encode_whole([text for text, words in zip(texts, rows) if not words]))
        joined = [found if isinstance(found, bytes) else b"".join(found) for found in joined]
        return [array("i", found) if found else next(others) for found in joined]

    def _learn(self, words: list[str], new: dict) -> None:
        (encoding,) = self.encoder.encode_batch_fast([" " + " ".join(words)], add_special_tokens=False)
        ids = np.array(encoding.ids, np.int32)
        every, starts = ids.tobytes(), (4 * np.flatnonzero(self.begins_word[ids])).tolist()
        for word, begin, end in zip(words, starts, [*starts[1:], len(every)], strict=True):
            new[word] += every[begin:end]

    def _split(self, text: str, use: tuple) -> list:
        """The words of a text, the first one with its use; none if they do not stand alone."""
        words: list = text.split(" ")
        if "" in words or SPACE in text or len(text) > self.LONGEST * len(words):
            return []
        words[0] = use, words[0]
        return words


class _Ids(dict):
    """int32 as bytes, of a word behind a space, and of (use, word) where a text begins."""

    def __missing__(self, word):
        self.complete = False
        return self.new[word]

    def of(self, words: list, new: dict) -> bytes | list:
        """Of all words, end to end; as a list while some are still to be filled in by the caller, in `new`."""
        self.complete, self.new = True, new
        found = list(map(self.__getitem__, words))
        return b"".join(found) if self.complete else found


def parts_before_model(backend: Tokenizer) -> dict[str, dict | None]:
    """Normalizer and pre-tokenizer as JSON, which is their pickled form."""
    parts = {name: getattr(backend, name) for name in ("normalizer", "pre_tokenizer")}
    return {name: None if part is None else json.loads(part.__getstate__()) for name, part in parts.items()}

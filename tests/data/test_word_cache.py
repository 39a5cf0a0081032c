"""Each word is encoded once, where that gives the text's own ids."""

import contextlib
import re
from array import array

import pytest
from tokenizers_at_hand import (
    SPECS,
    TEXTS,
    encode_prompts,
)

from sft.data import word_cache
from sft.data.encode import words_of

WORDS_STAND_ALONE = ["llama", "merged_spaces", "no_prefix", "merged_spaces_no_prefix", "no_byte_fallback"]


@pytest.mark.parametrize("name", [*SPECS, "xgen"])
def test_texts_of_words(llamas, xgen, name, monkeypatch):
    tokenizer = xgen if name == "xgen" else llamas[name]
    texts = [re.sub(" {2,}", " ", text.strip()) for text in TEXTS]
    expected = [tokenizer(text).input_ids for text in texts]
    assert encode_prompts(tokenizer, texts) == expected
    words = words_of(tokenizer)
    assert words.stand_alone == (name in WORDS_STAND_ALONE)
    if words.stand_alone:
        monkeypatch.setattr(words, "MOST_KEPT", 20)  # forgotten again and again
        assert [encode_prompts(tokenizer, [text])[0] for text in texts] == expected
        assert len(words.ids) < 100
    if name == "pieces_across_words":
        monkeypatch.setattr(words, "stand_alone", True)
        got = None
        with contextlib.suppress(
            ValueError
        ):  # more words than beginnings of words, if a piece spans two of those asked for
            got = encode_prompts(tokenizer, texts)
        assert got != expected


def test_each_word_is_encoded_once(llama):
    words = word_cache.Words(words_of(llama).encoder)
    river, runs = (llama(word, add_special_tokens=False).input_ids for word in ("river", "runs"))  # with ▁ before it
    asked = []

    def encode_whole(texts):
        asked.extend(texts)
        return [array("i", [-len(text)]) for text in texts]

    def encode(*texts, use="prompt"):
        asked.clear()
        return [ids.tolist() for ids in words.encode(list(texts), encode_whole, use)]

    assert encode("the river runs", "the  river", "runs river") == [[-3, *river, *runs], [-10], [-4, *river]]
    assert sorted(asked) == ["runs", "the", "the  river"]
    assert encode("the runs", "river") == [[-3, *runs], [-5]] and asked == ["river"]
    assert encode("the runs", use="response") == [[-3, *runs]] and asked == ["the"]
    others = ["", " the", "the ", "the▁river", "abcdefghijklmnop" * 3]
    assert encode(*others) == [[-len(text)] for text in others] and asked == others

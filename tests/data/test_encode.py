"""The ids of prompts, and of responses as their continuation."""

import json
from array import array
from types import SimpleNamespace

import pytest
from characters import BOS, EOS, character_tokenizer
from hypothesis import given, settings
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers_at_hand import HARD_TEXT, TEXTS, arguments, encode_prompts, encode_responses, load_llama
from transformers import (
    PreTrainedTokenizer,
    PreTrainedTokenizerFast,
)

from sft.data import encode, tokenizer_files
from sft.job import UserError

# "▁" is a space; the expected ids below are written with this table.
VOCABULARY = {
    "<unk>": 0,
    "<s>": 1,
    "</s>": 2,
    "▁": 3,
    "a": 4,
    "b": 5,
    "<": 6,
    "/": 7,
    "s": 8,
    ">": 9,
    "\n": 10,
    "ab": 11,
    "▁a": 12,
}


def hand_made(normalizer, pre_tokenizer):
    backend = Tokenizer(models.BPE(vocab=VOCABULARY, merges=[("a", "b"), ("▁", "a")], unk_token="<unk>"))
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    if normalizer is not None:
        backend.normalizer = normalizer
    if pre_tokenizer is not None:
        backend.pre_tokenizer = pre_tokenizer
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>", add_bos_token=True
    )


def metaspace(scheme):
    return pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)


PIPELINES = {
    "metaspace first": (None, metaspace("first")),
    "metaspace always": (None, metaspace("always")),
    "prepend": (
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
        None,
    ),  # LLaMA's first tokenizer.json
}


@pytest.mark.parametrize("pipeline", PIPELINES)
def test_ids_by_hand(pipeline):
    tokenizer = hand_made(*PIPELINES[pipeline])
    assert encode_prompts(tokenizer, ["ab", "b a", "a</s>"]) == [[1, 3, 11], [1, 3, 5, 12], [1, 12, 6, 7, 8, 9]]
    assert encode_responses(tokenizer, ["ab", " ab", "  a", "a</s>b", "<s>", "\na", "ab ", ""]) == [
        [11],
        [3, 11],
        [3, 12],
        [4, 6, 7, 8, 9, 5],
        [6, 8, 9],
        [10, 4],
        [11, 3],
        [],
    ]
    assert encode_prompts(tokenizer, ["a</s>"], allow_control_tokens=True) == [[1, 12, 2]]
    assert encode_responses(tokenizer, ["a</s>", "<s>"], allow_control_tokens=True) == [[4, 2], [1]]


def test_padding_and_truncation_of_earlier_calls_do_not_matter(llama):
    texts = ["the river", "the river and the mountain"]
    expected = [llama(text).input_ids for text in texts]
    llama(texts, padding=True, truncation=True, max_length=3)  # leaves both in the backend
    assert llama.backend_tokenizer.truncation is not None
    encode.backend_for.cache_clear()  # so that the copies are made now
    assert encode_prompts(llama, texts) == expected
    assert llama("a</s>").input_ids[-1] == 2  # the tokenizer itself still knows control tokens


@pytest.mark.parametrize("name", ["llama", "merged_spaces", "no_prefix", "user_defined", "xgen"])
def test_responses_are_what_follows_eos(llamas, xgen, name):
    tokenizer = xgen if name == "xgen" else llamas[name]

    @settings(max_examples=150, deadline=None)
    @given(text=HARD_TEXT)
    def check(text):
        if not any(token in text for token in tokenizer.all_special_tokens):
            eos, *ids = tokenizer(tokenizer.eos_token + text, add_special_tokens=False).input_ids
            assert eos == tokenizer.eos_token_id
            assert encode_responses(tokenizer, [text]) == [ids]

    check()


def test_prompt_and_response_join_as_one_text_does(llama):
    prompt = "The river:\n"
    joint = encode_prompts(llama, [prompt + text for text in TEXTS])
    assert joint == [encode_prompts(llama, [prompt])[0] + ids for ids in encode_responses(llama, TEXTS)]
    assert joint != [
        encode_prompts(llama, [prompt])[0] + ids[1:] for ids in encode_prompts(llama, TEXTS)
    ]  # with a second prefix


class CharacterTokenizer(PreTrainedTokenizer):
    """A tokenizer without a backend: a character's id is its code."""

    def __init__(self, **kwargs):
        super().__init__(unk_token="<unk>", bos_token="<s>", eos_token="</s>", **kwargs)

    @property
    def vocab_size(self):
        return 128

    def get_vocab(self):
        return {self._convert_id_to_token(i): i for i in range(128)}

    def _tokenize(self, text):
        return list(text)

    def _convert_token_to_id(self, token):
        return {"<unk>": 0, "<s>": 1, "</s>": 2}.get(token, ord(token[0]))

    def _convert_id_to_token(self, index):
        return {0: "<unk>", 1: "<s>", 2: "</s>"}.get(index, chr(index))

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        return [1, *token_ids_0]


@pytest.mark.parametrize("use", ["prompt", "response"])
def test_ids_that_generation_would_not_meet_are_refused(monkeypatch, use):
    real = encode.encode

    def one_id_more(tokenizer, which, *args):
        return [ids + array("i", [7] * (which == use)) for ids in real(tokenizer, which, *args)]

    monkeypatch.setattr(encode, "encode", one_id_more)
    with pytest.raises(UserError, match=rf"tokenizer: the {use} 'The quick brown fox .* gets .*Report this model"):
        tokenizer_files.finish(character_tokenizer(), arguments("m"))  # as every tokenizer that is loaded


def test_slow_tokenizers():
    tokenizer = CharacterTokenizer()
    assert not tokenizer.is_fast
    assert encode_prompts(tokenizer, ["A", "A</s>"]) == [[1, 65], [1, 65, 60, 47, 115, 62]]
    assert encode_responses(tokenizer, ["AB", "</s>", ""]) == [[65, 66], [60, 47, 115, 62], []]
    assert encode_responses(tokenizer, ["A</s>"], allow_control_tokens=True) == [[65, 2]]


@pytest.mark.parametrize("with_bos", [True, False])
def test_only_a_byte_level_tokenizer_json(tmp_path, capsys, with_bos):
    """As Llama 3's (BOS by its own template) and SmolLM2's (no BOS). Without an unk token, pad is EOS."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|begin|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS, trainer)
    saved = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|begin|>", eos_token="<|end|>", add_bos_token=with_bos
    )
    saved.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")  # Llama 3 has a tiktoken file of this name

    tokenizer = load_llama(tmp_path)
    assert capsys.readouterr().out == "tokenizer: pad is '<|end|>' (1); padding is never trained on\n"
    assert tokenizer.reference.name == "tokenizer.json"
    plain = backend.encode("the river", add_special_tokens=False).ids
    assert encode_prompts(tokenizer, ["the river"]) == [[0, *plain] if with_bos else plain]
    assert encode_responses(tokenizer, ["the river"]) == [plain]
    assert 1 not in encode_responses(tokenizer, ["a<|end|>"])[0]

    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": None}))
    with pytest.raises(UserError, match="the tokenizer has no EOS token"):
        load_llama(tmp_path)


def test_a_bos_in_a_cell_repeats_nothing_where_the_tokenizer_puts_none():
    tokenizer = character_tokenizer()
    put = encode.repeats(tokenizer, ["<s>a", "b"], array("i", [BOS, BOS, 97]), allow_control_tokens=True)
    none_put = encode.repeats(tokenizer, ["<s>a", "b"], array("i", [BOS, 97]), allow_control_tokens=True)
    assert (put, none_put) == (1, 0)


def test_the_text_behind_a_token_of_a_rendering_gets_no_prefix_space(llama):
    rendered = encode.guard(llama, "two </s>")
    (ids,) = encode.encode_rendered(llama, "prompt", [f"one</s>{rendered}"], bos=False)
    first, second = encode_prompts(llama, ["one"])[0], encode_responses(llama, ["two </s>"])[0]
    assert ids.tolist() == [*first[1:], llama.eos_token_id, *second]


def test_a_rendering_has_one_bos_also_where_a_message_spells_a_token():
    tokenizer = character_tokenizer()
    texts = [f"a{encode.guard(tokenizer, '</s>')}</s>b", "a</s>b"]
    found = [ids.tolist() for ids in encode.encode_rendered(tokenizer, "prompt", texts, bos=True)]
    assert found == [[BOS, *b"a</s>", EOS, *b"b"], [BOS, *b"a", EOS, *b"b"]]
    without = [ids.tolist() for ids in encode.encode_rendered(tokenizer, "prompt", texts, bos=False)]
    assert without == [ids[1:] for ids in found]


def test_where_ids_differ_from_the_references_is_shown():
    tokenizer, expected = character_tokenizer(), list(b"river bank")
    expected[6] = 7
    tokenizer.reference = SimpleNamespace(name="R", encode=lambda texts: [expected, list(b"sea")])
    assert encode.differences(tokenizer, ["river bank", "sea"]) == [
        "'river bank' from token 6: [114, 32, 98, 97, 110, 107], R [114, 32, 7, 97, 110, 107]"
    ]
    tokenizer.reference.encode = lambda texts: [list(b"rive")]  # nothing but an end that is missing
    assert encode.differences(tokenizer, ["river"]) == ["'river' from token 4: [118, 101, 114], R [118, 101]"]
    expected = [0, *b"iver"]
    tokenizer.reference.encode = lambda texts: [expected]
    assert encode.differences(tokenizer, ["river"])[0].startswith(
        "'river' from token 0: [114, 105, 118, 101, 114], R [0,"
    )

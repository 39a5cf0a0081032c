"""LLaMA's tokenizer against SentencePiece, XGen's against tiktoken, and the ids of prompts and responses."""

import contextlib
import json
import re
import shutil
import threading
import time
from array import array
from types import SimpleNamespace

import pytest
import sentencepiece
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tokenizer_files import make_texts, train_sentencepiece, write_gpt2_files
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaTokenizer,
    PreTrainedTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

import utils
from sft.data import csv_rows, encode, tokenizer_files, word_cache, xgen_tokenizer
from sft.data.checks import check_vocabulary
from sft.data.encode import PROBES, compare_with_reference, words_of
from sft.data.llama_tokenizer import _read_sentencepiece, _reference, load_llama_tokenizer
from sft.data.xgen_tokenizer import load_xgen_tokenizer
from sft.flags import DataArguments
from sft.job import UserError

TEXTS = make_texts()
# What is known to trip tokenizers, close together; and anything at all.
HARD_TEXT = st.text(
    st.sampled_from(list("abtheriv .,:\n\t\r▁<>/s_01é日😀\u0301\u200d\u00a0\x00")), max_size=40
) | st.text(max_size=30)


def arguments(folder, **other):
    return SimpleNamespace(
        **(
            {"model_name_or_path": str(folder), "cache_dir": None, "trust_remote_code": False, "gpt2_files": None}
            | other
        )
    )


def load_llama(folder):
    return load_llama_tokenizer(arguments(folder))


def encode_prompts(tokenizer, texts, **options) -> list[list[int]]:
    return [ids.tolist() for ids in encode.encode_prompts(tokenizer, texts, **options)]


def encode_responses(tokenizer, texts, **options) -> list[list[int]]:
    return [ids.tolist() for ids in encode.encode_responses(tokenizer, texts, **options)]


def reference_for(folder):
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


SPECS = {
    "llama": {},
    "merged_spaces": {"remove_extra_whitespaces": True},  # as OpenLLaMA's
    "no_prefix": {"add_dummy_prefix": False},
    "merged_spaces_no_prefix": {"remove_extra_whitespaces": True, "add_dummy_prefix": False},
    "no_byte_fallback": {"byte_fallback": False},
    "pieces_across_words": {"split_by_whitespace": False},
    "user_defined": {"user_defined_symbols": ["<user>", "\n", "<use", "in the"], "control_symbols": ["<mask>"]},
    "nmt_nfkc": {"normalization_rule_name": "nmt_nfkc"},
    "nmt_nfkc_merged_spaces": {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("sentencepiece")
    for name, spec in SPECS.items():
        train_sentencepiece(root / name, **spec)
    return root


@pytest.fixture(scope="module")
def llamas(folders):
    return {name: load_llama(folders / name) for name in SPECS}


@pytest.fixture(scope="module")
def llama(llamas):
    return llamas["llama"]


@pytest.fixture(scope="module")
def gpt2_files(tmp_path_factory):
    return write_gpt2_files(tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="module")
def xgen(gpt2_files):
    return load_xgen_tokenizer(arguments(gpt2_files, gpt2_files=str(gpt2_files)))


# --------------------------------------------------------------------------------------------------------------- LLaMA


@pytest.mark.parametrize("name", SPECS)
def test_llama_equals_sentencepiece(folders, llamas, name):
    symbols = ["<user>", "a<user>b", " <user> <use r> in the  in the", "<user>\n<user>", "in the"]
    texts = TEXTS + PROBES + (symbols if name == "user_defined" else [])
    assert encode_prompts(llamas[name], texts) == [[1, *ids] for ids in reference_for(folders / name).encode(texts)]
    compare_with_reference(llamas[name], texts)


@pytest.mark.parametrize("name", ["llama", "merged_spaces", "no_prefix", "no_byte_fallback"])
def test_llama_equals_sentencepiece_on_any_text(folders, llamas, name):
    tokenizer, reference = llamas[name], reference_for(folders / name)

    @settings(max_examples=300, deadline=None)
    @given(text=HARD_TEXT)
    def check(text):
        assert encode_prompts(tokenizer, [text]) == [[1, *reference.encode(text)]]

    check()


@pytest.mark.parametrize("name", ["llama", "merged_spaces"])
def test_the_stock_conversion_is_caught(folders, name):
    stock = LlamaTokenizer.from_pretrained(folders / name)
    model = str(folders / name / "tokenizer.model")
    stock.reference = _reference(model, _read_sentencepiece(model))
    inner = [text for text in TEXTS if text == text.strip()]  # not only the edges make it differ
    expected = reference_for(folders / name).encode(inner)
    wrong = [text for text, ids in zip(inner, expected) if stock(text, add_special_tokens=False).input_ids != ids]
    assert len(wrong) > len(inner) / 20
    with pytest.raises(UserError) as raised:
        compare_with_reference(stock, inner)
    assert f"{len(wrong)} of {len(inner)} texts get other ids than SentencePiece" in str(raised.value)
    assert f"First: {wrong[0][:100]!r}"[:-1] in str(raised.value)


def test_what_cannot_be_made_equal_is_refused_with_the_text(llamas):
    decomposed = [
        "Tie\u0302\u0301ng Vie\u0323\u0302t",
        "e\u0301 a\u0308 A\u030a",
        "\u1112\u1161\u11ab\u1100\u1173\u11af",
        "か\u3099 ～",
    ]
    compare_with_reference(llamas["nmt_nfkc"], decomposed)
    shown = r"1 of 5 texts .* First: 'one half with a macron ½̄' from token \d+: \[.*\], SentencePiece \[.*Remove or rewrite such rows"
    with pytest.raises(UserError, match=shown):
        compare_with_reference(llamas["nmt_nfkc"], [*decomposed, "one half with a macron ½\u0304"])


def test_models_that_llama_cannot_have(tmp_path):
    train_sentencepiece(tmp_path / "unigram", model_type="unigram")
    with pytest.raises(UserError, match="of type UNIGRAM; LLaMA's are of type BPE"):
        load_llama(tmp_path / "unigram")
    train_sentencepiece(tmp_path / "suffix", treat_whitespace_as_suffix=True)
    with pytest.raises(UserError, match=f"of {len(PROBES)} texts get other ids than SentencePiece"):
        load_llama(tmp_path / "suffix")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    with pytest.raises(UserError, match=r"not a SentencePiece model, and tokenizer\.json is not there"):
        load_llama(tmp_path / "broken")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"neither tokenizer\.json nor tokenizer\.model is there"):
        load_llama(tmp_path / "empty")


def test_llama_tokens_and_settings(folders, capsys):
    llama = load_llama(folders / "llama")
    assert capsys.readouterr().out.splitlines() == [
        f"tokenizer: built from {folders / 'llama' / 'tokenizer.model'}",
        "tokenizer: pad is '<unk>' (0); padding is never trained on",
        f"tokenizer: equals SentencePiece on {len(PROBES)} probe texts",
    ]
    assert (llama.unk_token_id, llama.bos_token_id, llama.eos_token_id, llama.pad_token_id) == (0, 1, 2, 0)
    assert len(llama) == 700
    text = "The river  runs é😀"
    assert llama.decode(llama(text).input_ids, skip_special_tokens=True) == text


@pytest.mark.parametrize("name", ["llama", "merged_spaces", "user_defined", "nmt_nfkc_merged_spaces"])
def test_saved_llama_tokenizer_reloads_to_the_same_ids(llamas, tmp_path, name):
    tokenizer = llamas[name]
    tokenizer.save_pretrained(tmp_path)
    LlamaConfig(vocab_size=700).save_pretrained(tmp_path)
    assert not (tmp_path / "tokenizer.model").exists()
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    texts = TEXTS + PROBES
    assert reloaded(texts).input_ids == tokenizer(texts).input_ids
    assert (reloaded.bos_token_id, reloaded.eos_token_id, reloaded.pad_token_id) == (1, 2, 0)
    again = load_llama(tmp_path)  # to train it further
    assert encode_prompts(again, texts) == encode_prompts(tokenizer, texts)
    assert encode_responses(again, texts) == encode_responses(tokenizer, texts)


def test_tokenizer_json_that_equals_sentencepiece_is_kept(folders, llama, tmp_path, capsys):
    shutil.copy(folders / "llama" / "tokenizer.model", tmp_path)
    llama.save_pretrained(tmp_path)
    tokenizer = load_llama(tmp_path)
    assert capsys.readouterr().out.splitlines() == [
        "tokenizer: pad is '<unk>' (0); padding is never trained on",
        f"tokenizer: equals SentencePiece on {len(PROBES)} probe texts",
    ]
    compare_with_reference(tokenizer, TEXTS)


def test_tokenizer_json_that_differs_from_sentencepiece_is_replaced(folders, tmp_path, capsys):
    shutil.copy(folders / "llama" / "tokenizer.model", tmp_path)
    published = LlamaTokenizer.from_pretrained(folders / "llama")
    published.add_tokens(["<extra>"], special_tokens=True)
    published.chat_template = "{{ messages }}"
    published.save_pretrained(tmp_path)
    tokenizer = load_llama(tmp_path)
    said = capsys.readouterr().out
    assert re.match(
        rf"tokenizer: tokenizer.json differs from tokenizer.model on \d+ of {len(PROBES)} probe texts; training and the saved model use ",
        said,
    )
    assert "First difference: 'cheese.  Rick said: " in said
    assert said.splitlines()[-1] == f"tokenizer: equals SentencePiece on {len(PROBES)} probe texts"
    compare_with_reference(tokenizer, TEXTS)
    assert tokenizer.convert_tokens_to_ids("<extra>") == 700  # what the folder adds is kept
    assert tokenizer.chat_template == "{{ messages }}"


def test_tokenizer_json_of_another_model_is_refused(llama, tmp_path):
    train_sentencepiece(tmp_path, vocab_size=650)
    llama.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"different vocabularies: \d+ pieces have other ids"):
        load_llama(tmp_path)


def test_what_the_folder_declares(folders, tmp_path):
    shutil.copy(folders / "llama" / "tokenizer.model", tmp_path)
    config = {
        "add_eos_token": True,
        "bos_token": "",
        "eos_token": {"content": "<|im_end|>"},
        "tokenizer_class": "LlamaTokenizer",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 700, "<|im_start|>": 701}))
    tokenizer = load_llama(tmp_path)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, len(tokenizer)) == (1, 700, 702)
    assert tokenizer("a").input_ids == [1, *reference_for(folders / "llama").encode("a")]

    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False}))
    assert load_llama(tmp_path)("a").input_ids == reference_for(folders / "llama").encode("a")

    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": 710}))
    with pytest.raises(UserError, match=r"'<\|im_end\|>' should have id 710"):
        load_llama(tmp_path)


@pytest.mark.parametrize("add_bos", [True, False])
def test_an_eos_added_to_every_text_is_taken_off_and_bos_kept(folders, llama, tmp_path, add_bos, capsys):
    llama.save_pretrained(tmp_path)
    adding = AutoTokenizer.from_pretrained(tmp_path)
    adding.add_bos_token = add_bos
    adding.add_eos_token = True
    adding.save_pretrained(tmp_path)
    plain = llama("a", add_special_tokens=False).input_ids
    before = [1] if add_bos else []
    assert AutoTokenizer.from_pretrained(tmp_path)("a").input_ids == [*before, *plain, 2]
    assert load_llama(tmp_path)("a").input_ids == [*before, *plain]
    assert "it added EOS to every text; that is off" in capsys.readouterr().out
    shutil.copy(folders / "llama" / "tokenizer.model", tmp_path)  # it is compared with SentencePiece before that
    assert encode_prompts(load_llama(tmp_path), ["a"]) == [[*before, *plain]]


DECLARED = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "tokenizer_class": "LlamaTokenizer"}


@pytest.mark.parametrize("with_json", [True, False])
def test_the_bos_is_the_one_that_is_put_whatever_name_is_declared(folders, tmp_path, with_json, capsys):
    """As in VMware's OpenLLaMA: </s> is declared as BOS; SentencePiece, config.json and tokenizer.json's template have <s>."""
    shutil.copy(folders / "merged_spaces" / "tokenizer.model", tmp_path)
    if with_json:
        published = LlamaTokenizer.from_pretrained(folders / "merged_spaces", add_bos_token=True)
        published.save_pretrained(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(DECLARED))
    LlamaConfig(vocab_size=700).save_pretrained(tmp_path)
    tokenizer = load_llama(tmp_path)
    expected = [1, *reference_for(tmp_path).encode("the river")]
    assert encode_prompts(tokenizer, ["the river"]) == [expected]
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    assert "tokenizer: BOS is '<s>' (1), which it puts before a prompt, not '</s>'" in capsys.readouterr().out
    assert check_vocabulary(tokenizer, LlamaConfig(vocab_size=700)) == []
    tokenizer_files.save(tokenizer, tmp_path / "export")
    LlamaConfig(vocab_size=700).save_pretrained(tmp_path / "export")
    exported = AutoTokenizer.from_pretrained(tmp_path / "export")
    assert (exported("the river").input_ids, exported.bos_token_id) == (expected, 1)

    LlamaConfig(vocab_size=700, bos_token_id=2).save_pretrained(tmp_path)
    if with_json:  # its template stays, and the contradiction is a problem
        (problem,) = check_vocabulary(load_llama(tmp_path), LlamaConfig(vocab_size=700, bos_token_id=2))
        assert 'write "bos_token_id": 1 into config.json' in problem
    else:  # where both declare it, it is so
        assert load_llama(tmp_path)("a").input_ids[0] == 2


def test_a_bos_that_is_not_the_models_is_refused_with_the_line_to_write(folders, tmp_path):
    tokenizer = load_llama(folders / "llama")
    (problem,) = check_vocabulary(tokenizer, LlamaConfig(vocab_size=700, bos_token_id=3))
    assert "puts '<s>' (1) before each prompt, but the model's config.json says bos_token_id 3 (" in problem
    assert 'write "bos_token_id": 1 into config.json; if with the second, name ' in problem
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False}))
    shutil.copy(folders / "llama" / "tokenizer.model", tmp_path)
    assert check_vocabulary(load_llama(tmp_path), LlamaConfig(vocab_size=700, bos_token_id=3)) == []  # none is put


def test_a_token_that_added_tokens_json_alone_declares_is_text(folders, tmp_path):
    shutil.copy(folders / "llama" / "tokenizer.model", tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"[PAD]": 700}))
    tokenizer, expected = load_llama(tmp_path), reference_for(tmp_path).encode("a [PAD]")
    assert encode_prompts(tokenizer, ["a [PAD]"]) == [[1, *expected]] and 700 not in expected
    assert encode_prompts(tokenizer, ["a [PAD]"], allow_control_tokens=True)[0][-1] == 700
    compare_with_reference(tokenizer, ["a [PAD]"])


@pytest.mark.parametrize("name", ["nmt_nfkc", "llama"])
def test_all_rows_are_compared_where_sentencepiece_changes_texts(folders, tmp_path, monkeypatch, name):
    monkeypatch.setitem(tokenizer_files.ROWS_COMPARED, "SentencePiece", 1)
    monkeypatch.setattr(csv_rows, "ROWS_PER_BATCH", 1)
    (tmp_path / "rows.csv").write_text("prompt,response\na,b\na,½\u0304\n", encoding="utf-8")
    tokenizer = load_llama(folders / name)
    differs = pytest.raises(UserError, match="1 of 2 texts get other ids than SentencePiece")
    with differs if name == "nmt_nfkc" else contextlib.nullcontext():
        data_args = DataArguments(data_path=str(tmp_path / "rows.csv"), data_cache_dir=str(tmp_path / "cache"))
        utils.tokenize_csv(data_args.data_path, tokenizer, data_args, 64)


# ------------------------------------------------------------------------------------------------ prompts and responses

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


@pytest.fixture(scope="module")
def split_digits(tmp_path_factory):
    """A tokenizer.json of SmolLM2's kind: digits are split first, and its class is one that transformers builds without that."""
    folder = tmp_path_factory.mktemp("digits")
    backend, byte_level = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    backend.decoder = decoders.ByteLevel()
    alphabet, special = pre_tokenizers.ByteLevel.alphabet(), ["<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([*TEXTS, *(f"a\n\n{i}. b" for i in range(200))], trainer)
    backend.save(str(folder / "tokenizer.json"))
    names = {"bos_token": special[0], "eos_token": special[1], "unk_token": special[0]}
    lengths = {"model_max_length": 77, "padding_side": "left"}
    config = {"tokenizer_class": "GPT2Tokenizer", "chat_template": "{{ messages }}"} | names | lengths
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    LlamaConfig(vocab_size=600, eos_token_id=1).save_pretrained(folder)
    return folder


def test_the_ids_are_those_of_tokenizer_json(split_digits, tmp_path, capsys):
    texts = [*TEXTS, *PROBES, "A list:\n\n1. one\n\n2. two"]
    file = Tokenizer.from_file(str(split_digits / "tokenizer.json"))
    expected = [encoding.ids for encoding in file.encode_batch(texts)]
    assert AutoTokenizer.from_pretrained(split_digits)(texts).input_ids != expected
    tokenizer = load_llama(split_digits)
    assert encode_prompts(tokenizer, texts) == expected
    assert re.search(
        r"transformers' GPT2Tokenizer has other steps than tokenizer\.json, with other ids on \d+ of 25",
        capsys.readouterr().out,
    )
    compare_with_reference(tokenizer, texts)
    tokenizer_files.save(tokenizer, tmp_path)
    LlamaConfig(vocab_size=600).save_pretrained(tmp_path)
    exported = AutoTokenizer.from_pretrained(tmp_path)
    assert exported(texts).input_ids == expected
    # what the folder says of its tokenizer is kept, and the name of the class is one that transformers 4 knows
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert (saved["model_max_length"], saved["padding_side"], exported.chat_template) == (77, "left", "{{ messages }}")
    assert saved["tokenizer_class"] == "PreTrainedTokenizerFast"


def test_ids_other_than_the_files_are_found(split_digits):
    tokenizer = load_llama(split_digits)
    encode.backend_for(tokenizer, "prompt", False).pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    with pytest.raises(
        UserError, match=r"2 of 3 texts get other ids than tokenizer\.json gives them with .*First: 'a\\n\\n1'"
    ):
        compare_with_reference(tokenizer, ["a\n\n1", "a", "b\n\n2"])


def test_a_type_of_model_that_transformers_reads_otherwise_is_refused(split_digits, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(split_digits / name, tmp_path)
    Qwen2Config(vocab_size=600).save_pretrained(tmp_path)
    with pytest.raises(
        UserError, match=r"with Qwen2Tokenizer, whatever its files say, and gives \d+ of 25 probe texts other ids"
    ) as raised:
        load_llama(tmp_path)
    exec(re.search(r'python -c "(.*)"', str(raised.value))[1])  # the cure
    assert encode_prompts(load_llama(tmp_path), ["a\n\n1"]) == [
        AutoTokenizer.from_pretrained(tmp_path)("a\n\n1").input_ids
    ]


# ---------------------------------------------------------------------------------------------------------------- XGen


@pytest.fixture(scope="module")
def gpt2_ranks(gpt2_files):
    return data_gym_to_mergeable_bpe_ranks(
        vocab_bpe_file=str(gpt2_files / "merges.txt"), encoder_json_file=str(gpt2_files / "vocab.json")
    )


@pytest.fixture(scope="module")
def xgen_reference(gpt2_ranks):
    """tiktoken with the ranks that XGen's published code gives it, and tiktoken's pattern for GPT-2."""
    runs = [b" " * n for n in range(31, 1, -1)] + [b"\t" * n for n in range(9, 1, -1)]
    return tiktoken.Encoding(
        name="xgen",
        pat_str=r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s""",
        mergeable_ranks=gpt2_ranks | {run: 50257 + i for i, run in enumerate(runs)},
        special_tokens={"<|endoftext|>": 50256},
    )


def test_xgen_equals_tiktoken(xgen, xgen_reference):
    texts = TEXTS + PROBES + ["a" + " " * n + "b" + "\t" * n for n in range(70)]
    expected = xgen_reference.encode_ordinary_batch(texts)
    assert encode_prompts(xgen, texts) == expected
    assert encode_responses(xgen, texts) == expected


def test_xgen_equals_tiktoken_on_any_text(xgen, xgen_reference):
    @settings(max_examples=300, deadline=None)
    @given(text=HARD_TEXT)
    def check(text):
        assert encode_prompts(xgen, [text]) == [xgen_reference.encode_ordinary(text)]

    check()


def test_xgen_ids(xgen):
    by_id = {
        50256: "<|endoftext|>",
        50257: "Ġ" * 31,
        50286: "Ġ" * 2,
        50287: "ĉ" * 9,
        50294: "ĉ" * 2,
        50295: "<fim_prefix>",
        50312: "<reponame>",
        50313: "<dummy_0>",
        50317: "<sep>",
        50318: "<eom>",
        50319: "<mask_881>",
        51199: "<mask_1>",
    }
    assert {i: xgen.convert_ids_to_tokens(i) for i in by_id} == by_id
    assert sorted(xgen.get_vocab().values()) == list(range(51200))
    assert (xgen.bos_token_id, xgen.eos_token_id, xgen.pad_token_id, xgen.unk_token_id) == (None, 50256, 50256, None)
    assert xgen("a   b<|endoftext|><fim_prefix>").input_ids[-2:] == [50256, 50295]
    assert 50256 not in encode_prompts(xgen, ["<|endoftext|>"])[0] + encode_responses(xgen, ["<|endoftext|>"])[0]
    text = "def f():\n        return 'é😀'\t\t"
    assert xgen.decode(xgen(text).input_ids) == text


def test_saved_xgen_tokenizer_reloads_to_the_same_ids(xgen, tmp_path):
    xgen.save_pretrained(tmp_path)
    LlamaConfig(vocab_size=51200).save_pretrained(tmp_path)
    texts = TEXTS + PROBES
    assert AutoTokenizer.from_pretrained(tmp_path)(texts).input_ids == xgen(texts).input_ids
    again = load_xgen_tokenizer(arguments(tmp_path))  # GPT-2's files are not needed any more
    assert encode_prompts(again, texts) == encode_prompts(xgen, texts)
    assert (again.eos_token_id, again.pad_token_id) == (50256, 50256)


def test_another_tokenizer_json_is_not_xgens(llama, tmp_path):
    llama.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"not XGen's tokenizer: '<\|endoftext\|>' has id None, XGen's is 50256"):
        load_xgen_tokenizer(arguments(tmp_path))


def test_gpt2_files_that_are_not(gpt2_files, tmp_path):
    with pytest.raises(UserError, match=r"--gpt2_files .*: vocab\.json and merges\.txt cannot be read"):
        load_xgen_tokenizer(arguments(tmp_path, gpt2_files=str(tmp_path)))
    shutil.copy(gpt2_files / "vocab.json", tmp_path)
    lines = (gpt2_files / "merges.txt").read_text(encoding="utf-8").splitlines()
    lines[1], lines[2] = lines[2], lines[1]
    (tmp_path / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(UserError, match="not GPT-2's files"):
        load_xgen_tokenizer(arguments(tmp_path, gpt2_files=str(tmp_path)))


def test_gpt2_from_tiktoken(gpt2_ranks, xgen, monkeypatch, tmp_path):
    monkeypatch.setattr(
        tiktoken, "get_encoding", lambda name: SimpleNamespace(_mergeable_ranks={"gpt2": gpt2_ranks}[name])
    )
    tokenizer = load_xgen_tokenizer(arguments(tmp_path))
    assert tokenizer.get_vocab() == xgen.get_vocab()
    assert encode_prompts(tokenizer, TEXTS) == encode_prompts(xgen, TEXTS)


@pytest.mark.parametrize("network", ["refuses", "swallows"])
def test_tiktoken_without_a_network(monkeypatch, tmp_path, network):
    released = threading.Event()

    def get_encoding(name):
        if network == "refuses":
            raise ConnectionError("Failed to resolve host")
        released.wait()

    monkeypatch.setattr(tiktoken, "get_encoding", get_encoding)
    monkeypatch.setattr(xgen_tokenizer, "TIKTOKEN_PATIENCE_S", 0.1)
    started = time.monotonic()
    reason = "ConnectionError: Failed to resolve host" if network == "refuses" else r"TimeoutError: no answer in 0\.1 s"
    with pytest.raises(UserError, match=rf"tiktoken cannot get GPT-2's files \({reason}\).*--gpt2_files FOLDER"):
        load_xgen_tokenizer(arguments(tmp_path))
    assert time.monotonic() - started < 5
    released.set()


# ----------------------------------------------------------------------------------------------------------- vocabulary


def test_check_vocabulary(llama, xgen):
    assert check_vocabulary(llama, LlamaConfig(vocab_size=700, eos_token_id=2)) == []
    assert check_vocabulary(llama, LlamaConfig(vocab_size=704, eos_token_id=[5, 2])) == []
    assert check_vocabulary(xgen, LlamaConfig(vocab_size=51200, eos_token_id=50256)) == []
    other_eos, outside = check_vocabulary(llama, LlamaConfig(vocab_size=699, eos_token_id=1))
    assert "EOS '</s>' is id 2, but the model's config.json says eos_token_id 1" in other_eos
    assert "1 tokens have ids outside the model's embedding of 699 rows" in outside
    assert len(check_vocabulary(xgen, LlamaConfig(vocab_size=50304, eos_token_id=50256))) == 1

"""LLaMA's tokenizer against SentencePiece."""

import contextlib
import json
import re
import shutil

import pytest
from hypothesis import given, settings
from tokenizer_files import train_sentencepiece
from tokenizers_at_hand import (
    HARD_TEXT,
    SPECS,
    TEXTS,
    encode_prompts,
    encode_responses,
    load_llama,
    reference_for,
)
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaTokenizer,
)

import utils
from sft.data import files, tokenizer_files
from sft.data.checks import check_vocabulary
from sft.data.encode import PROBES, compare_with_reference
from sft.data.llama_tokenizer import _read_sentencepiece, _reference
from sft.flags import DataArguments
from sft.job import UserError


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

    sides = {"model_max_length": 77, "padding_side": "left", "truncation_side": "left"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": False} | sides))
    assert {name: getattr(load_llama(tmp_path), name) for name in sides} == sides
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
    monkeypatch.setattr(files, "ROWS_PER_BATCH", 1)
    (tmp_path / "rows.csv").write_text("prompt,response\na,b\na,½\u0304\n", encoding="utf-8")
    tokenizer = load_llama(folders / name)
    differs = pytest.raises(UserError, match="1 of 2 texts get other ids than SentencePiece")
    with differs if name == "nmt_nfkc" else contextlib.nullcontext():
        data_args = DataArguments(data_path=str(tmp_path / "rows.csv"), data_cache_dir=str(tmp_path / "cache"))
        utils.tokenize_file(data_args.data_path[0], tokenizer, data_args, 64)

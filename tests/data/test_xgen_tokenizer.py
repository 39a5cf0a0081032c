"""XGen's tokenizer against tiktoken."""

import copy
import shutil
import threading
import time
from types import SimpleNamespace

import pytest
import tiktoken
from hypothesis import given, settings
from tiktoken.load import data_gym_to_mergeable_bpe_ranks
from tokenizers_at_hand import HARD_TEXT, TEXTS, arguments, encode_prompts, encode_responses
from transformers import (
    AutoTokenizer,
    LlamaConfig,
)

from sft.data import xgen_tokenizer
from sft.data.encode import PROBES
from sft.data.xgen_tokenizer import load_xgen_tokenizer
from sft.job import UserError


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


@pytest.mark.slow
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


def test_xgens_tokenizer_with_a_token_more_is_not_xgens(xgen):
    one_more = copy.deepcopy(xgen)
    one_more.add_tokens(["another"])
    with pytest.raises(UserError, match=r"m: not XGen's tokenizer: it has 51201 tokens, XGen 51200"):
        xgen_tokenizer._check_xgen(one_more, "m")


def test_gpt2_files_that_are_not(gpt2_files, tmp_path):
    with pytest.raises(UserError, match=r"--gpt2_files .*: vocab\.json and merges\.txt cannot be read"):
        load_xgen_tokenizer(arguments(tmp_path, gpt2_files=str(tmp_path)))
    shutil.copy(gpt2_files / "vocab.json", tmp_path)
    lines = (gpt2_files / "merges.txt").read_text(encoding="utf-8").splitlines()
    lines[1], lines[2] = lines[2], lines[1]
    (tmp_path / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(UserError, match="not GPT-2's files"):
        load_xgen_tokenizer(arguments(tmp_path, gpt2_files=str(tmp_path)))


@pytest.mark.slow
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

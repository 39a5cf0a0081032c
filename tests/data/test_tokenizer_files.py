"""The ids are those of tokenizer.json."""

import json
import re
import shutil

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers_at_hand import TEXTS, encode_prompts, load_llama
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    Qwen2Config,
)

from sft.data import encode, tokenizer_files
from sft.data.encode import PROBES, compare_with_reference
from sft.job import UserError


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

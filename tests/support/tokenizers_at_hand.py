"""Texts that trip tokenizers, the kinds of SentencePiece models, and ids as lists."""

from types import SimpleNamespace

import sentencepiece
from hypothesis import strategies as st
from tokenizer_files import make_texts

from sft.data import encode
from sft.data.llama_tokenizer import load_llama_tokenizer

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

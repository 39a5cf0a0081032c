"""Tokenizers that the tests of the data path share: one for each kind of SentencePiece model, and XGen's."""

import pytest
from tokenizer_files import train_sentencepiece, write_gpt2_files
from tokenizers_at_hand import SPECS, arguments, load_llama

from sft.data.xgen_tokenizer import load_xgen_tokenizer


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("sentencepiece")
    for name, spec in SPECS.items():
        train_sentencepiece(root / name, **spec)
    return root


@pytest.fixture(scope="session")
def llamas(folders):
    return {name: load_llama(folders / name) for name in SPECS}


@pytest.fixture(scope="session")
def llama(llamas):
    return llamas["llama"]


@pytest.fixture(scope="session")
def gpt2_files(tmp_path_factory):
    return write_gpt2_files(tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="session")
def xgen(gpt2_files):
    return load_xgen_tokenizer(arguments(gpt2_files, gpt2_files=str(gpt2_files)))

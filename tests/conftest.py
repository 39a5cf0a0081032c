"""What the tests share: a tiny LLaMA with a SentencePiece tokenizer, a small CSV, the real scripts through torchrun."""

import csv
import gc
import io
import os
import shutil
from pathlib import Path

# before torch is imported: models this small are faster so, and two processes of tests share the cores
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

gc.disable()  # until the tests are collected: looking again and again at what imports leave is an eighth of their time

# What takes seconds to import is imported by the fixtures that need it: pytest-xdist's first process, for which the others wait, runs none.


def pytest_collection_finish() -> None:
    gc.enable()


@pytest.fixture(scope="session")
def questions_csv(tmp_path_factory) -> Path:
    """64 rows of one-digit sums: `prompt,response`."""
    from scripts import QUESTIONS

    path = tmp_path_factory.mktemp("data") / "questions.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("prompt", "response"), *QUESTIONS])
    return path


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> None:
    """Accelerate collects garbage before each run, and looks at all that the imports left, for 0.3 s, if that is not set apart."""
    gc.freeze()


def pytest_collection_modifyitems(config, items) -> None:
    """With pytest-xdist the longest files come first, so that its processes end together."""
    long = {"test_stop_requests.py", "test_job.py", "test_readme.py"}
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: item.path.parent.name != "whole_runs" and item.path.name not in long)


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # or Triton's bindings would complain, at the end, of objects that were not let go


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Path:
    """A random two-layer LLaMA as OpenLLaMA is published: weights, a config, and tokenizer.model alone."""
    import sentencepiece
    from scripts import QUESTIONS, save_llama

    folder = tmp_path_factory.mktemp("tiny_llama")
    text = folder / "text.txt"
    text.write_text("\n".join(f"{question} {answer}" for question, answer in QUESTIONS), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(text), model_prefix=str(folder / "tokenizer"), model_type="bpe", vocab_size=320, byte_fallback=True,
        character_coverage=1.0, minloglevel=2,
    )  # fmt: skip
    (folder / "tokenizer.vocab").unlink()
    text.unlink()
    save_llama(folder, vocab_size=320)
    return folder


@pytest.fixture(scope="session")
def whole_run(tiny_llama, questions_csv, tmp_path_factory) -> Path:
    """The output folder of 16 undisturbed steps of 8 examples, two epochs; it keeps checkpoint-15 and checkpoint-16."""
    from saved_runs import flags_for, train

    output = tmp_path_factory.mktemp("whole") / "out"
    train(*flags_for(tiny_llama, questions_csv, output))
    return output


@pytest.fixture
def two_checkpoints(whole_run, tmp_path) -> Path:
    """A folder with checkpoint-15 and checkpoint-16 of the undisturbed run, to be damaged."""
    for name in ("checkpoint-15", "checkpoint-16"):
        shutil.copytree(whole_run / name, tmp_path / "out" / name)
    return tmp_path / "out"


@pytest.fixture(scope="session")
def watched(tiny_llama, questions_csv, tmp_path_factory):
    """48 examples, 6 to a step: 8 steps, evaluated on 16 rows at steps 0, 4 and 8."""
    from watched import EVALUATED, watch

    return watch(tiny_llama, questions_csv, tmp_path_factory.mktemp("watched") / "packed", EVALUATED)


@pytest.fixture(scope="session")
def watched_adapter(tiny_llama, questions_csv, tmp_path_factory):
    """An adapter, and no whole model."""
    pytest.importorskip("peft")
    from watched import watch

    folder = tmp_path_factory.mktemp("watched") / "adapter"
    return watch(tiny_llama, questions_csv, folder, "--use_lora True --max_steps 3 --learning_rate 0.1")


@pytest.fixture(scope="session")
def watched_padded(tiny_llama, questions_csv, tmp_path_factory):
    """The same run, padded."""
    from watched import EVALUATED, watch

    folder = tmp_path_factory.mktemp("watched") / "padded"
    return watch(tiny_llama, questions_csv, folder, EVALUATED, "--packing False")


@pytest.fixture(scope="module")
def characters():
    from characters import character_tokenizer

    return character_tokenizer()


@pytest.fixture
def write(tmp_path):
    """Write rows below a `prompt,response` header, or text or bytes as they are; return the path."""

    def write(content, name="data.csv"):
        path = tmp_path / name
        if isinstance(content, list):
            text = io.StringIO(newline="")
            csv.writer(text).writerows([("prompt", "response"), *content])
            content = text.getvalue()
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


@pytest.fixture
def make(tmp_path, characters):
    """Make the data module from a CSV with the character tokenizer and a cache of this test's own."""
    import utils
    from sft.flags import DataArguments, TrainingArguments

    def make(path, max_length=64, tokenizer=characters, **flags):
        data_args = DataArguments(data_path=path, data_cache_dir=str(tmp_path / "cache"), **flags)
        training_args = TrainingArguments(output_dir=str(tmp_path / "out"), model_max_length=max_length, use_cpu=True)
        return utils.make_supervised_data_module(tokenizer, data_args, training_args)

    return make

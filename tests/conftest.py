"""What the tests share: a tiny LLaMA with a SentencePiece tokenizer, a small CSV, the real scripts through torchrun."""

import csv
import gc
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece
import torch
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent

QUESTIONS = [
    (f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}.") for a in range(1, 9) for b in range(1, 9)
]  # 64 rows of 10 to 30 tokens


@pytest.fixture(scope="session")
def questions_csv(tmp_path_factory) -> Path:
    """64 rows of one-digit sums: `prompt,response`."""
    path = tmp_path_factory.mktemp("data") / "questions.csv"
    with open(path, "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("prompt", "response"), *QUESTIONS])
    return path


@pytest.fixture(scope="module", autouse=True)
def quick_collections() -> None:
    """Accelerate collects garbage before each run, and looks at all that the imports left, for 0.3 s, if that is not set apart."""
    gc.freeze()


def pytest_sessionfinish() -> None:
    gc.unfreeze()  # or Triton's bindings would complain, at the end, of objects that were not let go


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory) -> Path:
    """A random two-layer LLaMA as OpenLLaMA is published: weights, a config, and tokenizer.model alone."""
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
    from saved_runs import flags_for, train  # it imports the Trainer, which takes seconds

    output = tmp_path_factory.mktemp("whole") / "out"
    train(*flags_for(tiny_llama, questions_csv, output))
    return output


@pytest.fixture
def two_checkpoints(whole_run, tmp_path) -> Path:
    """A folder with checkpoint-15 and checkpoint-16 of the undisturbed run, to be damaged."""
    for name in ("checkpoint-15", "checkpoint-16"):
        shutil.copytree(whole_run / name, tmp_path / "out" / name)
    return tmp_path / "out"


def save_llama(folder: Path, vocab_size: int, **config) -> None:
    """Save a random two-layer LLaMA, the same one each time."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, **(shape | config))).save_pretrained(folder)


@pytest.fixture(scope="session")
def watched(tiny_llama, questions_csv, tmp_path_factory):
    """48 examples, 6 to a step: 8 steps, evaluated on 16 rows at steps 0, 4 and 8."""
    from watched import EVALUATED, watch

    return watch(tiny_llama, questions_csv, tmp_path_factory.mktemp("watched") / "packed", EVALUATED)


@pytest.fixture(scope="session")
def watched_padded(tiny_llama, questions_csv, tmp_path_factory):
    """The same run, padded."""
    from watched import EVALUATED, watch

    folder = tmp_path_factory.mktemp("watched") / "padded"
    return watch(tiny_llama, questions_csv, folder, EVALUATED, "--packing False")


def without_noise(stderr: str) -> str:
    """What a command said, without bitsandbytes' (0.50) warning at import, on some CPUs, of a kernel that is not installed."""
    return re.sub(r"^Failed to load CPU gemm_4bit_forward .*\n", "", stderr, flags=re.M)


def run_script(script: str, *flags: str, processes: int = 0, expect: int = 0, env: dict | None = None) -> str:
    """Run a script of the project as a user does and return what it printed, both streams together.

    Args:
        processes: 0 without torchrun, else `torchrun --nproc_per_node`.
        expect: the exit code that must come back.
    """
    launcher = [sys.executable]
    if processes:
        launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
        launcher += ["--rdzv_backend=c10d", "--rdzv_endpoint=127.0.0.1:0"]
    ended = subprocess.run(
        [*launcher, str(ROOT / script), *flags],
        env={**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1", **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert ended.returncode == expect, ended.stdout
    return ended.stdout

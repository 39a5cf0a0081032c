"""A small run in this process that is evaluated, sampled and recorded, and all that it printed."""

import contextlib
import io
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import psutil

import utils
from sft.data.llama_tokenizer import load_llama_tokenizer

SECRET, SECRET_IN_ENVIRONMENT = "hf_ThisMustNotBeWrittenAnywhere", "0123456789abcdef-a-key"
TEMPLATE = "Question: {instruction}\nAnswer:"
RECIPE = "--model_max_length 64 --learning_rate 1e-2 --num_train_epochs 1 --logging_steps 1 --seed 3 --save_strategy no"
EVALUATED = "--eval_split 0.25 --eval_strategy steps --eval_steps 4 --eval_on_start True --eval_samples 2"
EVALUATED += " --per_device_train_batch_size 2 --gradient_accumulation_steps 3 --per_device_eval_batch_size 3"


def flags_for(model: Path, csv: Path, output: Path, *more: str) -> list[str]:
    """The flags of a run; each of `more` may hold several, and the later one of two counts."""
    template = output.parent / "template.txt"
    template.write_text(TEMPLATE)
    return [
        "--model_name_or_path", str(model), "--data_path", str(csv), "--output_dir", str(output),
        "--data_cache_dir", str(output.parent / "cache"), "--prompt_template", str(template),
        *RECIPE.split(), *(word for words in more for word in words.split()),
    ]  # fmt: skip


def watch(model: Path, csv: Path, output: Path, *more: str) -> SimpleNamespace:
    """Train. Two secrets are in play.

    Returns: the trainer, the output folder, what was printed, the record; seconds of the run, and of this process.
    """
    command = ["llama_training.py", "--hub_token", SECRET, "--run_name", f"with {SECRET_IN_ENVIRONMENT}"]
    printed, began = io.StringIO(), time.time()
    with (
        mock.patch.dict("os.environ", {"WANDB_API_KEY": SECRET_IN_ENVIRONMENT}),
        mock.patch.object(sys, "argv", command),
        contextlib.redirect_stdout(printed),
    ):
        trainer = utils.train(load_llama_tokenizer, flags_for(model, csv, output, f"--hub_token {SECRET}", *more))
    seconds, age = time.time() - began, time.time() - psutil.Process().create_time()
    record = json.loads((output / "run_report.json").read_text())
    watched = {"trainer": trainer, "folder": output, "printed": printed.getvalue(), "record": record}
    return SimpleNamespace(**watched, seconds=seconds, age=age)

"""A run of 16 steps in two epochs, small enough to repeat in a second or two, and what can be asked of its checkpoints."""

import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file

import utils
from sft.data.llama_tokenizer import load_llama_tokenizer
from sft.job import swapped
from sft.report import record
from sft.run.trainer import SupervisedTrainer
from sft.saving import checkpoint, resume

RECIPE = "--num_train_epochs 2 --learning_rate 1e-2 --logging_steps 1 --model_max_length 64 --seed 3 --save_steps 3"
RECIPE += " --per_device_train_batch_size 2 --gradient_accumulation_steps 4 --save_total_limit 2 --disable_tqdm True"
ZERO_2 = {
    "zero_optimization": {"stage": 2},
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "zero_allow_untested_optimizer": True,
}


def flags_for(model: Path, csv: Path, output: Path, *more: str) -> list[str]:
    return [
        "--model_name_or_path", str(model), "--data_path", str(csv), "--output_dir", str(output),
        "--data_cache_dir", str(csv.parent / "cache"), *RECIPE.split(), *more,
    ]  # fmt: skip


def losses(output: Path) -> list[tuple]:
    """(step, loss, gradient norm, learning rate) of every step that led to the newest checkpoint."""
    newest = checkpoint.newest_first(output)[0]
    history = json.loads((newest / "trainer_state.json").read_text())["log_history"]
    return [(e["step"], e["loss"], e["grad_norm"], e["learning_rate"]) for e in history if "loss" in e]


def same_weights(one: Path, other: Path) -> bool:
    first, second = load_file(one / "model.safetensors"), load_file(other / "model.safetensors")
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def train(*flags: str):
    with swapped(record, draw=draws_nothing):
        return utils.train(load_llama_tokenizer, list(flags))


def draws_nothing(*_, **__) -> None:
    """In place of a run's pictures, a third of a small one's time; tests/report/test_picture.py and the demo's test look at them."""


def choose(output: Path, wanted="True") -> str | None:
    return resume.choose_checkpoint(SimpleNamespace(resume_from_checkpoint=wanted, output_dir=str(output)))


def signal_at(monkeypatch, step: int, number=signal.SIGUSR1) -> None:
    """Send this process a signal in the first micro-batch of a step."""
    real = SupervisedTrainer.training_step

    def training_step(self, model, inputs, num_items_in_batch=None):
        if self.state.global_step + 1 == step and not self.message.micro_batches:
            os.kill(os.getpid(), number)
        return real(self, model, inputs, num_items_in_batch)

    monkeypatch.setattr(SupervisedTrainer, "training_step", training_step)

"""Numbers that are not finite end a run before the weights are touched, with the rows they came from; spikes are told."""

import csv
import re
import shutil
import signal
from collections import deque
from pathlib import Path
from types import SimpleNamespace

import jobs
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from saved_runs import choose, flags_for, train
from scripts import QUESTIONS

from sft.job import UserError
from sft.plan import proof
from sft.run import finite_check
from sft.run.step_message import StepMessage
from utils import DataCollatorForSupervisedDataset


class Rows:
    """Three examples; the second stands in the file twice."""

    ids = (torch.tensor([1, 5, 6]), torch.tensor([1, 7]), torch.tensor([1, 7]), torch.tensor([1, 8]))
    lengths = np.array([3, 2, 2, 2])

    def where(self, index):
        return f"row {[2, 3, 5, 9][index]}"

    def __getitem__(self, index):
        return {"input_ids": self.ids[index]}


def test_rows_are_found_by_their_tokens_packed_and_padded():
    packed = {"input_ids": torch.tensor([[1, 8, 1, 5, 6]]), "cu_seq_lens_q": torch.tensor([0, 2, 5])}
    assert finite_check.rows_of(packed, Rows()) == ["row 2", "row 9"]
    examples = [{"input_ids": Rows.ids[i], "labels": Rows.ids[i]} for i in (0, 1)]
    padded = DataCollatorForSupervisedDataset(type("T", (), {"pad_token_id": 1}))(examples)
    assert finite_check.rows_of(padded, Rows()) == ["row 2", "row 3", "row 5"]


def test_a_spike_is_a_loss_outside_the_band_of_those_before_it():
    calm = [2.0, 2.1, 1.9, 2.05, 1.95, 2.0, 2.1, 1.9, 2.0, 2.05]
    assert finite_check.is_spike(3.0, calm)
    assert finite_check.is_spike(3.0, [*calm, 9.0])  # one spike does not hide the next
    assert not finite_check.is_spike(2.3, calm)  # inside the band
    assert not finite_check.is_spike(1.0, calm)
    assert not finite_check.is_spike(3.0, calm[:9])  # too little to compare with
    assert not finite_check.is_spike(2.1, deque([2.0] * 50))  # a band of no width still allows 20 %
    restless = [1.0, 3.0] * 5  # their median is 2, and each is 1 away from it
    assert not finite_check.is_spike(7.9, restless) and finite_check.is_spike(8.1, restless)
    assert finite_check.is_spike(3.0, calm[:10]) and finite_check.is_spike(2.41, deque([2.0] * 10))


def test_a_run_tells_of_a_loss_that_leaps(watched, capsys):
    (spikes,) = [one for one in watched.trainer.callback_handler.callbacks if isinstance(one, finite_check.LossSpikes)]
    spikes.losses.clear()
    state = SimpleNamespace(global_step=7)
    for loss in [2.0] * 10 + [3.0, 2.0]:
        spikes.on_log(None, state, None, logs={"loss": loss})
    spikes.on_log(None, state, None, logs={"eval_loss": 9.0})
    notice = "notice: step 7: the loss is 3.0000; the 10 before it had a median of 2.0000\n"
    assert capsys.readouterr().out == notice


@pytest.mark.parametrize(
    ("checkpoints", "step", "adapter", "said"),
    [
        ([], 0, False, ["No step was taken yet.", "in a run that starts anew."]),
        ([3, 12], 12, False, ["They are in checkpoint-12.", "/checkpoint-12) or starts anew."]),
        (
            [3, 12],
            14,
            False,
            ["could not be saved (see above); checkpoint-12 is the newest.", "/checkpoint-12) or starts"],
        ),
        ([], 4, False, ["They could not be saved (see above).\n", "in a run that starts anew."]),
        (
            [4],
            4,
            True,
            ["They are in checkpoint-4.", "that starts anew, because an adapter's checkpoint cannot begin one."],
        ),
    ],
)
def test_only_a_checkpoint_that_exists_is_advised(tmp_path, checkpoints, step, adapter, said):
    for number in checkpoints:
        (tmp_path / f"checkpoint-{number}").mkdir()
    advice = finite_check.what_to_try(str(tmp_path), step, adapter)
    assert all(part in advice for part in said), advice
    named = re.findall(r"checkpoint-(\d+)", advice)
    assert set(map(int, named)) <= set(checkpoints)


POISONED_ROW = 40


# the rehearsal would refuse weights that are not finite, as the export does
UNREHEARSED = ("--save_rehearsal", "False")


@pytest.fixture(scope="module")
def poisoned(tiny_llama, tmp_path_factory):
    """A model whose embedding of the tokens of `@` is infinite, and a CSV with an `@` in one row."""
    folder = tmp_path_factory.mktemp("poisoned")
    model, data = folder / "model", folder / "data.csv"
    shutil.copytree(tiny_llama, model)
    weights = load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"][3 + ord("@")] = float("inf")  # byte fallback: <0x40>
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    rows = [[q, a] for q, a in QUESTIONS]
    rows[POISONED_ROW - 2][1] += " @"
    with open(data, "w", newline="") as file:
        csv.writer(file).writerows([("prompt", "response"), *rows])
    return model, data


def prove_with_random_weights() -> None:
    """In a rank: the proof reads the checkpoint's first layers too, and would refuse this one before the first step."""
    proof.loaded_layers = proof.random_layers


@pytest.mark.parametrize("packing", ["True", "False"])
def test_a_loss_that_is_not_finite_stops_before_the_weights_are_touched(poisoned, tmp_path, packing, monkeypatch):
    monkeypatch.setattr(proof, "loaded_layers", proof.random_layers)
    output = tmp_path / "out"
    with pytest.raises(UserError) as stopped:
        train(*flags_for(*poisoned, output, *UNREHEARSED, "--packing", packing, "--save_steps", "100", "--seed", "4"))
    message = str(stopped.value)
    step = int(re.search(r"step (\d+): the loss is nan", message)[1])
    assert step == 5  # seed 4 puts the row there
    assert re.search(rf"rank 0, micro-batch \d: (row \d+, )*row {POISONED_ROW}\b", message)
    assert f"the weights are those of step {step - 1}. They are in checkpoint-{step - 1}." in message
    assert not callable(signal.getsignal(signal.SIGTERM))  # a signal that comes now is not for a step
    kept = Path(choose(output))
    assert kept.name == f"checkpoint-{step - 1}"
    weights = load_file(kept / "model.safetensors")
    assert all(tensor.isfinite().all() for name, tensor in weights.items() if name != "model.embed_tokens.weight")
    assert not (output / "COMPLETE.json").exists()


def test_a_gradient_that_is_not_finite_stops_with_the_rows_of_the_step(
    tiny_llama, questions_csv, tmp_path, monkeypatch
):
    real, sent = StepMessage.exchange, []

    def infinite_at_step_2(self, grad_norm, *others, **more):
        sent.append(grad_norm)
        return real(self, torch.tensor(float("inf")) if len(sent) == 2 else grad_norm, *others, **more)

    monkeypatch.setattr(StepMessage, "exchange", infinite_at_step_2)
    with pytest.raises(UserError) as stopped:
        train(*flags_for(tiny_llama, questions_csv, tmp_path / "out"))
    message = str(stopped.value)
    assert "step 2: every loss is finite but the gradient norm is inf" in message
    assert len(set(re.findall(r"\brow \d+", message))) == 8  # the examples of one step


@pytest.mark.slow
def test_the_rank_with_the_broken_loss_is_named_by_all(poisoned, tmp_path):
    flags = flags_for(*poisoned, tmp_path / "out", *UNREHEARSED)
    printed = jobs.run(flags, 2, tmp_path / "log", prove_with_random_weights, expect=2)
    assert len(re.findall(r"error: step \d+: the loss is nan", printed)) == 1
    assert re.search(rf"rank [01], micro-batch \d: (row \d+, )*row {POISONED_ROW}\b", printed)

"""Rows that are filled up train as before, and a step is captured only where that was found right and faster. The graphs themselves need a GPU."""

import doctest
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from packed_models import gradients, largest_error, rows, small_llama

from sft.step import attention, captured_steps
from sft.step.captured_steps import CapturedSteps, FilledRows, choose_capture, row_length
from sft.step.loss import summed_loss
from sft.step.modules import exchange
from sft.step.packed_rows import PackedCollator, group_by_prefix


def test_drawn_examples():
    assert doctest.testmod(captured_steps) == (0, 4)


@pytest.mark.parametrize("share", [None, group_by_prefix])
@pytest.mark.parametrize("count", [5, 8])
def test_a_filled_row_gives_the_same_loss_and_gradients(share, count):
    model = small_llama(attn_implementation=attention.PER_EXAMPLE).double()
    head, examples = exchange(model), rows(count)
    for example in examples[1:4]:  # a beginning to share
        example["input_ids"][:1] = examples[0]["input_ids"][:1]
    found = []
    for collator in (PackedCollator(share), FilledRows(PackedCollator(share), examples=8)):
        model.zero_grad()
        batch = collator(examples)
        loss = summed_loss(model, head, batch)
        loss.backward()
        found.append((loss.item(), gradients(model), batch))
    (loss, expected, row), (filled_loss, filled, filled_row) = found
    assert filled_loss == pytest.approx(loss, rel=1e-12) and largest_error(filled, expected) < 1e-12
    assert (filled_row["labels"] != -100).sum() == (row["labels"] != -100).sum()
    tokens = row["input_ids"].shape[1]
    assert filled_row["input_ids"].shape[1] == row_length(tokens) == filled_row["max_length_q"] > tokens
    # the filling example must be one of its own: joined to the last, which it does not follow, nothing would show
    assert filled_row["cu_seq_lens_q"].tolist() == [*row["cu_seq_lens_q"].tolist(), *[row_length(tokens)] * (9 - count)]


def test_less_than_a_twentieth_of_real_steps_is_filled():
    random = np.random.default_rng(0)
    lengths = np.minimum(random.lognormal(5, 0.8, 16_000).astype(int) + 10, 1024)
    for examples in (4, 16, 64):
        steps = lengths[: 16_000 // examples * examples].reshape(-1, examples).sum(axis=1).tolist()
        filled = [row_length(tokens) for tokens in steps]
        assert sum(filled) / sum(steps) < 1.035 and max(a / b for a, b in zip(filled, steps)) < 1.0626
        assert len(set(filled)) < 80


def choice(device="cuda", **flags):
    known = dict.fromkeys(("fsdp", "deepspeed", "fp16", "gradient_checkpointing", "torch_compile", "capture_steps"))
    args = SimpleNamespace(device=torch.device(device), world_size=1)
    args.optim = flags.get("optim", "adamw_torch_fused")
    vars(args).update(known | {name: value for name, value in flags.items() if name in known or name == "world_size"})
    step = {"step_tokens": np.float64(3_200), "micro_batches": 1, "not_for": ""}
    return str(choose_capture(args, 1_100_000_000, 22, **step | {name: flags[name] for name in flags if name in step}))


def test_a_step_is_tried_where_it_can_gain_and_where_it_is_safe():
    assert choice() == "captured steps: on (the GPU computes about 53 ms in a step, and launching takes about 88)"
    assert choice(step_tokens=25_000).startswith("captured steps: off (the GPU computes about 412 ms")
    assert choice(step_tokens=25_000, capture_steps=True) == "captured steps: on (--capture_steps)"
    assert choice(capture_steps=False) == "captured steps: off (--capture_steps)"
    assert choice("cpu") == "captured steps: off (on a CPU)"
    for flag in ({"world_size": 2}, {"fsdp": True}, {"deepspeed": {}, "world_size": 2}):
        assert choice(**flag, capture_steps=True) == "captured steps: off (several ranks)"
    assert choice(optim="lomo") == "captured steps: off (--optim lomo)"
    assert choice(micro_batches=2) == "captured steps: off (several micro-batches in a step)"
    assert choice(not_for="dropout or noise is drawn", capture_steps=True).endswith("(dropout or noise is drawn)")


class Graph:
    """In the place of a captured step: writes its loss and gradient."""

    def __init__(self, weight, compute):
        self.weight, self.compute, self.replayed = weight, compute, 0

    def replay(self):
        self.replayed += 1
        self.loss.fill_(self.compute(self.inputs))


@pytest.fixture
def steps(monkeypatch):
    """Steps whose "graph" computes what `loss_of` says, and whose clock goes on as `seconds` say."""
    made = SimpleNamespace(loss_of=lambda inputs: float(inputs["input_ids"].sum()), captures=0, error=None)
    model = torch.nn.Linear(1, 1, bias=False)
    captured = CapturedSteps(FilledRows(PackedCollator(), 4))

    def capture(model, inputs, items, compute):
        made.captures += 1
        if made.error:
            return captured._stop(model, made.error)
        graph = Graph(model.weight, made.loss_of)
        graph.inputs, graph.loss = {name: value.clone() for name, value in inputs.items()}, torch.zeros(())
        return captured_steps.Captured(
            graph, graph.inputs, items.clone(), graph.loss, [(model.weight, torch.ones(1, 1))]
        )

    def timed(action):
        result = action()
        return made.seconds.pop(0), result

    def step(ids):
        inputs = {"input_ids": torch.tensor([ids]), "label_positions": torch.arange(2)}
        launch = lambda: torch.tensor(float(sum(ids)))  # noqa: E731
        return captured.step(model, inputs, torch.tensor(2), None, launch).item()

    monkeypatch.setattr(captured, "_capture", capture)
    monkeypatch.setattr(captured_steps, "_timed", timed)
    made.seconds, made.captured, made.step, made.model = [0.08, 0.04], captured, step, model
    return made


def test_steps_are_replayed_once_that_was_found_faster(steps, capsys):
    assert [steps.step([1, 2]), steps.step([3, 4]), steps.step([5, 6]), steps.step([7, 8, 9])] == [3, 7, 11, 24]
    assert steps.captures == 2 and torch.equal(steps.model.weight.grad, torch.ones(1, 1))
    assert (
        "captured steps: on, forward and backward of 2 tokens take 40 ms replayed, 80 launched"
        in capsys.readouterr().out
    )


@pytest.mark.parametrize("fault, printed", [
    ("slow", "captured steps: off, forward and backward of 2 tokens take 79 ms replayed, 80 launched"),
    ("wrong", "captured steps: off, the replayed loss is 8.000000, the launched one 7.000000"),
    ("error", "captured steps: off, no"),
])  # fmt: skip
def test_steps_stay_launched_with_one_line_that_says_why(steps, capsys, fault, printed):
    if fault == "slow":
        steps.seconds = [0.08, 0.079]
    if fault == "wrong":
        steps.loss_of = lambda inputs: float(inputs["input_ids"].sum()) + 1
    steps.error = "no" if fault == "error" else None
    assert [steps.step([1, 2]), steps.step([3, 4]), steps.step([5, 6])] == [3, 7, 11]
    assert steps.captures == 1 and not steps.captured.rows.on and not steps.captured.graphs
    out = capsys.readouterr().out
    assert printed in out and out.count("captured steps:") == 1


def test_a_replayed_step_is_divided_by_its_own_number_of_tokens():
    items, loss = torch.tensor(3), torch.zeros(())
    graph = SimpleNamespace(replay=lambda: loss.fill_(12.0 / items))
    captured = captured_steps.Captured(graph, {}, items, loss, [])
    assert [captured_steps.replay(captured, {}, torch.tensor(tokens)).item() for tokens in (3, 4, 6)] == [4, 3, 2]

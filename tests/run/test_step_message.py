"""The one message of a step: what any rank meets, all ranks know, whichever rank it was."""

import math

import pytest
import torch

from sft.run.step_message import Received, StepMessage

FINE = {"loss": 1.0, "norm": 0.5, "stop": False, "counts": [10.0, 4.0]}


def received(*ranks: dict) -> Received:
    """What rank 0 reads where the ranks send this; each has two micro-batches of half its loss."""
    sent: list[torch.Tensor] = []

    def send(about: dict, gather) -> Received:
        message, more = StepMessage(torch.device("cpu"), gather), FINE | about
        for _ in range(2):
            message.add({}, torch.tensor(more["loss"] / 2))
        norm = more["norm"] if more["norm"] is None else torch.tensor(more["norm"])
        flags = {"overflow": more.get("overflow", False), "norm_may_overflow": more.get("fp16", False)}
        return message.exchange(norm, more["stop"], more["counts"], **flags)

    for about in ranks[1:]:
        send(about, lambda mine: sent.append(mine) or mine)
    return send(ranks[0], lambda mine: torch.cat([mine, *sent]))


@pytest.mark.parametrize("other", [0, 1])
@pytest.mark.parametrize(
    ("about", "broken", "stop"),
    [
        ({"loss": math.nan}, True, False),
        ({"loss": math.inf}, True, False),
        ({"norm": math.inf}, True, False),
        ({"overflow": True}, True, False),
        ({"norm": math.inf, "fp16": True}, False, False),  # the scaler skips that update itself
        ({"loss": math.nan, "fp16": True}, True, False),
        ({"norm": None}, False, False),
        ({"stop": True}, False, True),
        ({}, False, False),
    ],
)
def test_what_one_rank_meets_all_know(about, broken, stop, other):
    found = received(*((about, {}) if other == 0 else ({}, about)))
    assert (found.broken, found.stop) == (broken, stop)


def test_losses_are_averaged_and_counts_kept_apart():
    found = received({"loss": 1.0}, {"loss": 4.0, "counts": [7.0, 3.0]})
    assert (found.loss, found.grad_norm) == (2.5, 0.5)
    assert found.counts.tolist() == [[10, 4], [7, 3]]
    assert math.isnan(received({"norm": None}).grad_norm)

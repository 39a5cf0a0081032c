"""Exchange the one message of each step: what every rank must know of the others before the weights are updated.

It carries stop requests, the loss, the gradient norm, whether one of them is not finite, and the counts of tokens. Nothing else in a
step waits for the GPU.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.distributed.tensor import DTensor


class Received(NamedTuple):
    """A step's message as all ranks read it."""

    broken: bool  # a loss or the gradient norm is not finite, on some rank
    loss: float  # mean over the ranks
    grad_norm: float  # NaN where none was computed
    stop: bool  # some rank was asked to stop
    counts: torch.Tensor  # (ranks, numbers), float64: what each rank added


class StepMessage:
    """The message of one step after the other."""

    def __init__(self, device: torch.device, gather: Callable[[torch.Tensor], torch.Tensor]):
        self.device, self.gather = device, gather  # of this rank; (1, numbers) -> (ranks, numbers)
        self.micro_batches: list[tuple[dict, torch.Tensor]] = []  # of this step: inputs, loss on its device

    def add(self, inputs: dict, loss: torch.Tensor) -> None:
        """Remember a micro-batch of this step; its loss stays on the device, so that nothing waits for it."""
        self.micro_batches.append((inputs, loss.detach()))

    def exchange(
        self,
        grad_norm: torch.Tensor | float | None,
        stop: bool,
        counts: list[float],
        overflow: bool = False,
        norm_may_overflow: bool = False,
    ) -> Received:
        """Give this rank's numbers of the step to all ranks, and read theirs.

        Args:
            grad_norm: the same on all ranks; the other numbers are each rank's own.
            overflow: the engine saw a gradient that is not finite.
            norm_may_overflow: with float16 an infinite norm is how the loss scale is found; the scaler skips that update itself.
        """
        norm = grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm
        norm = torch.as_tensor(float("nan") if norm is None else norm, dtype=torch.float32, device=self.device)
        loss = torch.stack([loss for _, loss in self.micro_batches]).sum().float()
        broken = ~torch.isfinite(loss) | overflow
        if grad_norm is not None and not norm_may_overflow:
            broken |= ~torch.isfinite(norm)
        known = torch.tensor([stop, *counts], dtype=torch.float64).to(self.device, non_blocking=True)
        numbers = torch.cat([torch.stack([broken.double(), loss.double(), norm.double()]), known])
        every = self.gather(numbers[None]).cpu()  # (ranks, numbers); the host waits here
        broken_somewhere, losses, norms, stop_somewhere = every[:, :4].T
        loss_mean, counted = float(losses.mean()), every[:, 4:]
        return Received(bool(broken_somewhere.any()), loss_mean, float(norms[0]), bool(stop_somewhere.any()), counted)

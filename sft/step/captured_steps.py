"""Replay a small step's forward, loss and backward pass as one CUDA graph, so that the GPU does not wait for Python to launch its kernels.

A graph holds for one length of row and one number of labelled positions, so rows are filled up to a few of each: with one example more,
without labels, and with empty examples. No gradient changes. Clipping, the optimizer and what is logged stay as they are.
"""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from sft import IGNORE_INDEX
from sft.job import Choice, say

# Seconds that Python takes to launch one layer's kernels, forward and backward, and operations per second of the GPU meanwhile: only to
# leave out steps that are far too long to gain (benchmarks/LOG.md). The others are measured.
LAUNCHING, FLOPS_PER_S = 4e-3, 4e14
WORTH = 0.95  # a replayed step takes at most so much of a launched one, or steps stay launched


def choose_capture(
    args: Any, parameters: int, layers: int, step_tokens: float, micro_batches: int, not_for: str
) -> Choice:
    """Decide whether a run tries to capture its steps.

    Args:
        step_tokens: of one step on this rank, on average.
        not_for: why this model cannot; "" when it can.
    """
    computing, launching = 6 * parameters * step_tokens / FLOPS_PER_S, LAUNCHING * layers
    refused = {
        "on a CPU": args.device.type != "cuda",
        "several ranks": args.world_size > 1 or args.fsdp or args.deepspeed,
        "several micro-batches in a step": micro_batches > 1,
        "fp16 scales each step's loss anew": args.fp16,
        "activations are recomputed": args.gradient_checkpointing,
        "--torch_compile": args.torch_compile,
        # others update weights in the backward pass, or are told when training goes on
        f"--optim {args.optim}": not args.optim.startswith("adamw"),
        not_for: bool(not_for),
    }
    on, why = False, next((why for why, holds in refused.items() if holds), "")
    if args.capture_steps is False:
        why = "--capture_steps"
    elif not why and args.capture_steps:
        on, why = True, "--capture_steps"
    elif not why:
        on = bool(computing < 1.5 * launching)
        why = f"the GPU computes about {1e3 * computing:.0f} ms in a step, and launching takes about {1e3 * launching:.0f}"
    return Choice("captured steps", on, why)


def row_length(tokens: int) -> int:
    """The fixed length that a row of so many tokens is filled up to, 16 of them in each octave: at most a 16th more.

    Example:
        >>> [row_length(tokens) for tokens in (9, 2048, 2049, 3100, 5000)]
        [16, 2048, 2176, 3200, 5120]
    """
    step = max(16, 1 << max(tokens.bit_length() - 5, 0))
    return -(-tokens // step) * step


class FilledRows:
    """A collator that fills the rows of another one.

    Args:
        collator: a PackedCollator.
        examples: the most in one row.

    Example:
        >>> from sft.step.packed_rows import PackedCollator
        >>> row = FilledRows(PackedCollator(), examples=3)([{"input_ids": [7] * 9, "labels": [-100] * 6 + [7] * 3}])
        >>> row["input_ids"].shape, row["cu_seq_lens_q"].tolist(), row["label_positions"].tolist(), row["label_targets"].tolist()
        (torch.Size([1, 16]), [0, 9, 16, 16, 16], [5, 6, 7, 0], [7, 7, 7, -100])
    """

    def __init__(self, collator: Callable[[list], dict[str, Any]], examples: int):
        self.collator, self.places = collator, examples + 2  # and the filling one, and where the last one ends
        self.on = True

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch = self.collator(examples)
        return self.fill(batch) if self.on else batch

    def fill(self, batch: dict[str, Any]) -> dict[str, Any]:
        tokens, trained = batch["input_ids"].shape[1], len(batch["label_positions"])
        row = row_length(tokens)
        capacity = -(-4 * max(trained, 1) // row) * row // 4  # of labelled positions: a quarter of the row, a half, ...
        fills = {"labels": (row - tokens, IGNORE_INDEX), "label_targets": (capacity - trained, IGNORE_INDEX)}
        fills |= dict.fromkeys(("input_ids", "position_ids"), (row - tokens, 0))
        edges = self.places - len(batch["cu_seq_lens_q"])
        fills |= dict.fromkeys(("cu_seq_lens_q", "cu_seq_lens_k"), (edges, row))
        fills |= dict.fromkeys(("prefix_starts", "prefix_lengths"), (edges, 0))
        filled = {
            name: F.pad(batch[name], (0, more), value=value) for name, (more, value) in fills.items() if name in batch
        }
        # positions whose target is ignored: each once, because a gradient is added up where they meet
        filled["label_positions"] = torch.cat([batch["label_positions"], torch.arange(capacity - trained)])
        return batch | filled | {"max_length_q": row, "max_length_k": row}


class Captured(NamedTuple):
    """One graph and the places that it reads and writes."""

    graph: Any
    inputs: dict[str, Any]
    items: torch.Tensor
    loss: torch.Tensor
    gradients: list[tuple[torch.nn.Parameter, torch.Tensor]]


class CapturedSteps:
    """The graphs of a run's steps, one for each shape that it has met."""

    def __init__(self, rows: FilledRows):
        self.rows = rows
        self.graphs: dict[tuple[int, int], Captured] = {}
        self.pool: Any = None  # memory that the graphs share: one runs at a time
        self.steps = 0

    def step(
        self, model: torch.nn.Module, inputs: dict[str, Any], items: torch.Tensor, compute: Callable, launch: Callable
    ) -> torch.Tensor:
        """The loss of one step; its gradients lie in the parameters.

        Args:
            items: labelled tokens of the step, on the GPU.
            compute: (model, inputs, items) -> loss, after its backward pass.
            launch: does the whole as the stock Trainer does; returns the loss.
        """
        self.steps += 1
        if not self.rows.on or self.steps == 1:  # the first one loads libraries and tunes kernels
            return launch()
        if not self.graphs:
            loss = self._try(model, inputs, items, compute, launch)
            return launch() if loss is None else loss
        shape = inputs["input_ids"].shape[1], len(inputs["label_positions"])
        if shape not in self.graphs:
            captured = self._capture(model, inputs, items, compute)
            if captured is None:
                return launch()
            self.graphs[shape] = captured
        return replay(self.graphs[shape], inputs, items)

    def _try(
        self, model: torch.nn.Module, inputs: dict[str, Any], items: torch.Tensor, compute: Callable, launch: Callable
    ) -> torch.Tensor | None:
        """Capture a step, and compare it with the launched one: its loss and the seconds. None leaves all steps launched."""
        launch()  # loads what this length of row needs
        model.zero_grad()
        seconds, launched = _timed(launch)
        model.zero_grad()
        captured = self._capture(model, inputs, items, compute)
        if captured is None:
            return None
        shape = inputs["input_ids"].shape[1], len(inputs["label_positions"])
        replay(captured, inputs, items)
        replayed_seconds, loss = _timed(lambda: replay(captured, inputs, items))
        took = f"forward and backward of {shape[0]:,} tokens take {1e3 * replayed_seconds:.0f} ms replayed, {1e3 * seconds:.0f} launched"
        if not torch.allclose(loss, launched, rtol=1e-4):
            return self._stop(model, f"the replayed loss is {loss.item():.6f}, the launched one {launched.item():.6f}")
        if replayed_seconds > WORTH * seconds:
            return self._stop(model, took)
        self.graphs[shape] = captured
        say(f"captured steps: on, {took}")
        return loss

    def _capture(
        self, model: torch.nn.Module, inputs: dict[str, Any], items: torch.Tensor, compute: Callable
    ) -> Captured | None:
        inputs = {name: value.clone() if torch.is_tensor(value) else value for name, value in inputs.items()}
        items, graph = items.clone(), torch.cuda.CUDAGraph()
        self.pool = self.pool or torch.cuda.graph_pool_handle()
        model.train()
        model.zero_grad()
        try:
            # where a capture fails, torch (2.13) stays on its stream; other threads go on: a loader's may pin memory
            with (
                torch.cuda.stream(torch.cuda.current_stream()),
                torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"),
            ):
                loss = compute(model, inputs, items)
            trained = [weight for weight in model.parameters() if weight.grad is not None]
            # tensors that do not own their memory: the next graph's gradients may lie there too
            gradients = [(weight, torch.as_tensor(_Place(weight.grad), device=weight.device)) for weight in trained]
        except Exception as error:  # of any model, such as one that asks the GPU for a value; if it is no fault of capturing, it comes again
            cause = error.__context__ or error  # before the one that ends the capture
            why = f"{type(cause).__name__}: {cause}".splitlines()[0]
            return self._stop(model, f"this model's cannot be ({why})")
        model.zero_grad()
        return Captured(graph, inputs, items, loss.detach(), gradients)

    def _stop(self, model: torch.nn.Module, why: str) -> Any:
        """Leave all steps launched from here on. Returns None."""
        self.rows.on = False
        self.graphs.clear()
        self.pool = None
        model.zero_grad()
        say(f"captured steps: off, {why}")


def replay(captured: Captured, inputs: dict[str, Any], items: torch.Tensor) -> torch.Tensor:
    """Run a graph on these inputs; its loss."""
    for name, place in captured.inputs.items():
        if torch.is_tensor(place):
            place.copy_(inputs[name], non_blocking=True)
    captured.items.copy_(items)
    captured.graph.replay()
    for weight, gradient in captured.gradients:
        weight.grad = gradient
    return captured.loss.clone()


class _Place:
    """Where a float32 tensor lies, by the interface that CUDA libraries share."""

    def __init__(self, tensor: torch.Tensor):
        assert tensor.dtype == torch.float32 and tensor.is_contiguous()
        where = {"data": (tensor.data_ptr(), False), "shape": tuple(tensor.shape)}
        self.__cuda_array_interface__ = where | {"typestr": "<f4", "version": 3}


def _timed(action: Callable[[], torch.Tensor]) -> tuple[float, torch.Tensor]:
    torch.cuda.synchronize()
    began = time.perf_counter()
    result = action()
    torch.cuda.synchronize()
    return time.perf_counter() - began, result

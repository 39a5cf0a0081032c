"""Compute the loss at labelled positions only: logits of all tokens x vocabulary never exist."""

import contextlib
import importlib.util
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from sft import IGNORE_INDEX
from sft.job import Choice, swapped

CHUNK_BYTES = 2**29  # float32 logits of one chunk at most: large enough for full matrix products, small beside a model
LIGER = "Liger's kernel"


def losses_and_gradient(
    logits: torch.Tensor, targets: torch.Tensor, smoothing: float = 0.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy in float32 of each position, (positions,), and d loss / d logits in the logits' type, (positions, vocabulary).

    Args:
        smoothing: this share of a target is spread over the whole vocabulary, as by transformers' LabelSmoother.
    """
    scores = logits.float()
    trained = targets != IGNORE_INDEX
    safe = torch.where(trained, targets, 0)[:, None]
    log_sum = scores.logsumexp(-1, keepdim=True)
    here = torch.arange(logits.shape[1], device=logits.device)[None] == safe
    wanted = scores.gather(1, safe)
    likely = here.float()
    if smoothing:
        wanted = (1 - smoothing) * wanted + smoothing * scores.mean(-1, keepdim=True)
        likely = (1 - smoothing) * likely + smoothing / logits.shape[1]
    losses = torch.where(trained[:, None], log_sum - wanted, 0.0)
    gradient = ((scores - log_sum).exp() - likely) * trained[:, None]
    return losses[:, 0], gradient.to(logits.dtype)


class SummedLoss(torch.autograd.Function):
    """Sum of the cross-entropies of `hidden @ weight.T`, one chunk of positions at a time, float32, ().

    Of (positions, hidden), (vocabulary, hidden), targets, (positions,), and a `loss_kernel`.
    The gradient is taken in forward, while a chunk's logits exist, so nothing is computed twice. No host synchronisation.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        kernel: Callable,
        train: bool,
    ) -> torch.Tensor:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        rows, head = hidden.to(dtype), weight.to(dtype)
        # Equal chunks: a rest of any length would need another of cuBLAS's kernels in most steps, and loading one stops the GPU.
        chunks = max(1, math.ceil(rows.shape[0] * 4 * weight.shape[0] / CHUNK_BYTES))
        chunk = max(1, math.ceil(rows.shape[0] / chunks))
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hidden_gradient = torch.empty_like(rows) if train and ctx.needs_input_grad[0] else None
        weight_gradient = torch.zeros_like(weight, dtype=torch.float32) if train and ctx.needs_input_grad[1] else None
        with torch.autocast(device, enabled=False):
            for start in range(0, rows.shape[0], chunk):
                part = slice(start, start + chunk)
                # A copy: compiled for a view of all targets, the graph would hold for one number of chunks.
                losses, gradient = kernel(rows[part] @ head.T, targets[part].clone())
                total += losses.sum()
                if hidden_gradient is not None:
                    torch.mm(gradient, head, out=hidden_gradient[part])
                if weight_gradient is None:
                    continue
                if device == "cuda":  # summed in float32 by the product itself, without a copy in the compute type
                    inputs = weight_gradient, gradient.T, rows[part]
                    torch.addmm(*inputs, out_dtype=torch.float32, out=weight_gradient)
                else:
                    weight_gradient += gradient.T @ rows[part]
        ctx.gradients = hidden_gradient, weight_gradient
        ctx.dtypes = hidden.dtype, weight.dtype
        return total

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None  # scaled in place and let go: the head's may take gigabytes
        scaled = (
            None if gradient is None else gradient.mul_(scale).to(dtype)
            for gradient, dtype in zip(gradients, ctx.dtypes)
        )
        return (*scaled, None, None, None)


class LossOfLogits(torch.autograd.Function):
    """Sum of the losses that a `loss_kernel` finds for logits, (positions, vocabulary), float32, ()."""

    @staticmethod
    def forward(ctx: Any, logits: torch.Tensor, targets: torch.Tensor, kernel: Callable) -> torch.Tensor:
        losses, gradient = kernel(logits, targets)
        ctx.save_for_backward(gradient)
        return losses.sum()

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return ctx.saved_tensors[0] * scale, None, None


def with_liger(
    kernel: Any, smoothing: float, logits: torch.Tensor, targets: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`losses_and_gradient` by Liger's kernel, which writes the gradient over the logits.

    The kernel alone: the functions around it ask the GPU how many targets count, in each micro-batch, and nothing may wait for that
    (liger-kernel 0.8, ops/cross_entropy.py, from where its numbers of warps and of columns at a time are).
    """
    positions, vocabulary = logits.shape
    losses = torch.zeros(positions, dtype=torch.float32, device=logits.device)  # it leaves those of ignored targets
    kernel[(positions,)](
        X_ptr=logits, X_stride=logits.stride(0), Y_ptr=targets, Y_stride=1, weight_ptr=None, loss_ptr=losses, loss_stride=1,
        z_loss_ptr=None, token_accuracy_ptr=None, token_accuracy_stride=0, predicted_tokens_ptr=None, predicted_tokens_stride=0,
        n_cols=vocabulary, n_non_ignore=1, sum_non_ignore_weight=1, weight_sum=0.0, ignore_index=IGNORE_INDEX,
        lse_square_scale=0.0, label_smoothing=smoothing, reduction="sum", softcap=None, RETURN_Z_LOSS=False,
        RETURN_TOKEN_ACCURACY=False, RETURN_PREDICTED_TOKENS=False, BLOCK_SIZE=min(2**15, 1 << (vocabulary - 1).bit_length()),
        HAS_WEIGHT=False, HAS_SOFTCAPPING=False, HAS_GRADIENTS=True, num_warps=16 if torch.version.hip else 32,
    )  # fmt: skip
    return losses, logits


def of_bent_logits(kernel: Callable, scale: float, cap: float | None) -> Callable:
    """A kernel for a model that multiplies its logits by `scale` (Granite, Cohere) and bends them: cap x tanh(logits / cap) (Gemma)."""

    def bent(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = logits * scale
        if cap is None:
            losses, gradient = kernel(logits, targets)
            return losses, gradient * scale
        part = torch.tanh(logits / cap)
        losses, gradient = kernel(part * cap, targets)
        return losses, gradient * (1 - part * part) * scale

    return bent


def loss_kernel(device: torch.device, compiled: bool, smoothing: float = 0.0) -> tuple[Callable, Choice]:
    """What computes losses and their gradient from a chunk of logits, and why. No choice changes more than rounding."""
    ours = partial(losses_and_gradient, smoothing=smoothing) if smoothing else losses_and_gradient
    if compiled:  # one kernel of many passes
        return torch.compile(ours, dynamic=True), Choice("head and loss", "compiled", "as the layers are")
    if device.type == "cuda" and importlib.util.find_spec("liger_kernel"):
        from liger_kernel.ops.cross_entropy import liger_cross_entropy_kernel

        why = "liger-kernel is installed and layers are not compiled"
        return partial(with_liger, liger_cross_entropy_kernel, smoothing), Choice("head and loss", LIGER, why)
    why = "layers are not compiled; with liger-kernel installed less memory"
    return ours, Choice("head and loss", "PyTorch's operations", why)


def summed_loss(model: torch.nn.Module, head: torch.nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    """Sum of the losses over the trained tokens of a `PackedCollator`'s batch, float32, (); `head` is what `modules.exchange` returns."""
    inputs = {key: value for key, value in batch.items() if key not in ("labels", "label_targets")}
    with contextlib.ExitStack() as stack:
        stack.enter_context(swapped(head, positions=batch["label_positions"], targets=batch["label_targets"]))
        for target, name, value in head.neutral:  # what the model does to logits is in the kernel
            stack.enter_context(swapped(target, **{name: value}))
        outputs = model(**inputs, use_cache=False)
    auxiliary = getattr(outputs, "aux_loss", None)  # of a router: a mean over tokens, weighted as the trained ones
    if auxiliary is None:
        return outputs.logits
    return outputs.logits + head.auxiliary * auxiliary * (batch["label_targets"] != IGNORE_INDEX).sum()

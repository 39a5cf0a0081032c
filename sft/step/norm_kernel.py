"""Compute the backward pass of an RMS norm in one kernel: the gradient of its input, the residual's added, and that of its weight.

The compiler sums a norm's weight gradient over all tokens in a kernel of its own, which reads the same tensors once more and at half
the memory's speed (torch 2.11, benchmarks/LOG.md). Here each block walks over some tokens and keeps its part of the sum.
"""

from typing import Any

import torch
import triton
import triton.language as tl

MOST = 3  # gradients that the kernel adds up: of query, key and value


@triton.jit(do_not_specialize=["tokens"])
def _backward(
    first, second, third, residual, hidden, rstd, weight, d_hidden, d_weights, tokens,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, GRADIENTS: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """Of n programs each takes every n-th token. `d_weights`, (programs, WIDTH), is left to be added up."""
    column = tl.arange(0, BLOCK)
    row = tl.full([], WIDTH, tl.int64)  # a row of tokens may hold more than 2^31 numbers
    there = column < WIDTH
    scale = tl.load(weight + column, there, other=0.0).to(tl.float32)
    d_weight = tl.zeros([BLOCK], tl.float32)
    for token in range(tl.program_id(0), tokens, tl.num_programs(0)):
        at = token * row + column
        gradient = tl.load(first + at, there, other=0.0).to(tl.float32)
        if GRADIENTS > 1:
            gradient += tl.load(second + at, there, other=0.0).to(tl.float32)
        if GRADIENTS > 2:
            gradient += tl.load(third + at, there, other=0.0).to(tl.float32)
        inverse = tl.load(rstd + token)
        normed = tl.load(hidden + at, there, other=0.0).to(tl.float32) * inverse
        scaled = gradient * scale
        result = inverse * (scaled - normed * (tl.sum(scaled * normed, 0) / WIDTH))
        if RESIDUAL:
            result += tl.load(residual + at, there, other=0.0).to(tl.float32)
        tl.store(d_hidden + at, result.to(d_hidden.dtype.element_ty), there)
        d_weight += gradient * normed.to(hidden.dtype.element_ty).to(tl.float32)  # as forward rounds it
    tl.store(d_weights + tl.program_id(0) * row + column, d_weight, there)


@torch.library.custom_op("sft::norm_backward", mutates_args=())
def norm_backward(
    gradients: list[torch.Tensor],
    residual: torch.Tensor | None,
    hidden: torch.Tensor,
    rstd: torch.Tensor,
    weight: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of `hidden`, in its type, and of `weight`, float32.

    Args:
        gradients: up to three, (..., width) each, whose sum is the output's gradient.
        residual: added to the gradient of `hidden`, whose shape it has.
        hidden: the norm's input, (..., width).
        rstd: 1 / root mean square of each token, (..., 1), float32.
        weight: (width,).
    """
    tokens, width = rstd.numel(), hidden.shape[-1]
    gradients = [gradient.contiguous() for gradient in gradients]
    first, second, third = (gradients * MOST)[:MOST]
    beside = hidden if residual is None else residual.contiguous()
    programs = 16  # interpreted, on a CPU
    if hidden.device.type == "cuda":
        programs = 4 * torch.cuda.get_device_properties(hidden.device).multi_processor_count
    d_hidden = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    d_weights = torch.empty(programs, width, dtype=torch.float32, device=hidden.device)
    _backward[(programs,)](
        first, second, third, beside, hidden.contiguous(), rstd.contiguous(), weight, d_hidden, d_weights, tokens,
        WIDTH=width, BLOCK=triton.next_power_of_2(width), GRADIENTS=len(gradients), RESIDUAL=residual is not None,
        num_warps=8,
    )  # fmt: skip
    return d_hidden, d_weights.sum(0)


@norm_backward.register_fake
def _shapes(gradients, residual, hidden, rstd, weight):
    return hidden.new_empty(hidden.shape), weight.new_empty(weight.shape, dtype=torch.float32)


class Norm(torch.autograd.Function):
    """LLaMA's norm of (..., width) hidden states: its own forward pass, which the compiler joins with what lies around it."""

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
        wide = hidden.to(torch.float32)
        rstd = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(hidden, rstd, weight)
        return weight * (wide * rstd).to(hidden.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        hidden, rstd, weight = ctx.saved_tensors
        d_hidden, d_weight = norm_backward([gradient], None, hidden, rstd, weight)
        return d_hidden, d_weight.to(weight.dtype), None


class FusedNorm(torch.nn.Module):
    """LLaMA's norm with the backward pass of this file."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return Norm.apply(hidden_states, self.weight, self.variance_epsilon)

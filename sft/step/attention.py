"""Confine attention to each example of a packed row, and choose the kernel for it."""

import contextlib
import importlib.util
import inspect
import os
import shutil
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, PreTrainedConfig

from sft.job import Choice, UserError, swapped

# The keywords changed between torch 2.10 and 2.13: causal attention was `is_causal=True`, grouped heads needed no word.
VARLEN_WORDS = frozenset(inspect.signature(varlen_attn).parameters)
TRITON = "triton"
VARLEN = "varlen"
PER_EXAMPLE = "per_example"
# tokens that a token sees in the operator of sft/step/attention_kernel.py, where the model sets no window
NO_WINDOW = 2**30
# These let a token see its own example and the shared prefix of another one (sft/step/packed_rows.py).
SHARE_PREFIXES = (TRITON, PER_EXAMPLE)
TRITON_HEADS = (16, 32, 64, 128)  # other sizes, padded, are slower than in FlashAttention (benchmarks/LOG.md)


def _one_row(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> list[torch.Tensor]:
    """Each as (tokens, heads, head_dim) in the compute type: query and key leave the rotary embedding in float32 under autocast."""
    assert query.shape[0] == 1, "packed attention takes one row"
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else value.dtype
    return [tensor[0].transpose(0, 1).to(dtype) for tensor in (query, key, value)]


def _require(cu_seq_lens: torch.Tensor | None) -> None:
    if cu_seq_lens is None:
        raise UserError("this model does not hand its attention the borders of packed examples (cu_seq_lens)")


def triton(
    module: torch.nn.Module,
    query: torch.Tensor,  # as varlen's
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    scaling: float,
    cu_seq_lens_q: torch.Tensor | None = None,
    prefix_starts: torch.Tensor | None = None,  # (examples + 1,), int32, like the next: see PackedCollator
    prefix_lengths: torch.Tensor | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """As `varlen`, by the operator of sft/step/attention_kernel.py, which is imported where it is chosen: it needs Triton."""
    _require(cu_seq_lens_q)
    window = sliding_window or NO_WINDOW
    edges = cu_seq_lens_q, prefix_starts, prefix_lengths
    out, *_ = torch.ops.sft.packed_attention(*_one_row(query, key, value), *edges, scaling, window)
    return out[None], None


def varlen(
    module: torch.nn.Module,
    query: torch.Tensor,  # (1, heads, tokens, head_dim)
    key: torch.Tensor,  # (1, key heads, tokens, head_dim)
    value: torch.Tensor,  # as key
    attention_mask: None,
    scaling: float,
    cu_seq_lens_q: torch.Tensor | None = None,  # (examples + 1,), int32
    max_length_q: int | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """FlashAttention over the examples of one packed row; (1, tokens, heads, head_dim) in the compute type."""
    _require(cu_seq_lens_q)
    head_dim = query.shape[-1]
    missing = -head_dim % 8  # the kernel wants a multiple of 8; zeros change neither the scores nor the other outputs
    q, k, v = _one_row(query, key, value)
    if missing:  # F.pad copies even where it adds nothing
        q, k, v = (F.pad(rows, (0, missing)) for rows in (q, k, v))
    window = (-1 if sliding_window is None else sliding_window - 1, 0)
    options: dict[str, Any] = {"window_size": window} if "window_size" in VARLEN_WORDS else {"is_causal": True}
    if "enable_gqa" in VARLEN_WORDS:
        options["enable_gqa"] = True
    longest: Any = max_length_q
    out: Any = varlen_attn(q, k, v, cu_seq_lens_q, cu_seq_lens_q, longest, longest, scale=scaling, **options)
    return out[None, ..., :head_dim], None


def per_example(
    module: torch.nn.Module,
    query: torch.Tensor,  # (1, heads, tokens, head_dim)
    key: torch.Tensor,  # (1, key heads, tokens, head_dim)
    value: torch.Tensor,  # as key
    attention_mask: None,
    scaling: float,
    dropout: float = 0.0,
    cu_seq_lens_q: torch.Tensor | None = None,  # (examples + 1,), int32
    prefix_starts: torch.Tensor | None = None,  # (examples + 1,), int32, like the next
    prefix_lengths: torch.Tensor | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """PyTorch's attention on one example after another; (1, tokens, heads, head_dim)."""
    _require(cu_seq_lens_q)
    lengths = cu_seq_lens_q.diff().tolist()
    assert sliding_window is None or max(lengths) <= sliding_window, "choose() lets no sliding window come here"
    value = value.to(query.dtype)
    nothing = [0] * len(lengths)
    starts, shared = (nothing if edge is None else edge.tolist() for edge in (prefix_starts, prefix_lengths))
    options = {"dropout_p": dropout, "is_causal": True, "scale": scaling, "enable_gqa": True}
    examples = list(zip(*(rows.split(lengths, dim=2) for rows in (query, key, value))))
    number_of = {start: number for number, start in enumerate(cu_seq_lens_q.tolist())}
    out = []
    for example, start, before in zip(examples, starts, shared):
        if before:  # the whole example, so that no mask is needed; what comes out for its prefix is not used
            leader = examples[number_of[start]]
            example = tuple(torch.cat([prefix[:, :, :before], rows], 2) for prefix, rows in zip(leader, example))
        attended = F.scaled_dot_product_attention(*example, **options)
        out.append(attended[:, :, before:] if before else attended)
    return torch.cat(out, dim=2).transpose(1, 2), None


AttentionInterface.register(TRITON, triton)
AttentionInterface.register(VARLEN, varlen)
AttentionInterface.register(PER_EXAMPLE, per_example)


def choose_attention(
    model_config: PreTrainedConfig, device: torch.device, dtype: torch.dtype, requested: str | None = None
) -> Choice:
    """The kernel for packed rows: the user's, else the fastest that can run here.

    Args:
        dtype: the compute type.
        requested: `--attn_implementation`.

    Raises:
        UserError: the requested kernel cannot run here. Whether it keeps examples apart is proved later (sft/plan/proof.py).
    """
    head_dim = getattr(model_config, "head_dim", None) or model_config.hidden_size // model_config.num_attention_heads
    where = f"{device.type}, {str(dtype).removeprefix('torch.')}, head_dim {head_dim}"
    half = dtype in (torch.float16, torch.bfloat16)
    # FlashAttention 2, which varlen_attn calls, needs an Ampere GPU or a newer one, and so do Triton's bf16 products.
    ampere = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    dropout = getattr(model_config, "attention_dropout", 0.0) > 0.0
    window = getattr(model_config, "sliding_window", None)
    can_varlen = ampere and half and head_dim <= 256 and not dropout
    no_triton = triton_problem(head_dim)
    if requested in (TRITON, VARLEN) and not can_varlen:
        raise UserError(
            f"--attn_implementation {requested} needs a GPU of compute capability 8.0, bf16 or fp16, heads of at most 256 and "
            f"no attention dropout; here it is {where}. Leave the flag out, and per_example is used."
        )
    if requested == TRITON and no_triton:
        raise UserError(f"--attn_implementation triton: {no_triton}. Leave the flag out, and varlen is used.")
    if requested not in (None, TRITON, VARLEN, PER_EXAMPLE):
        return Choice("attention", requested, f"--attn_implementation; {where}")
    name, reason = requested, "--attn_implementation; "
    if requested is None:
        name, reason = TRITON if can_varlen else PER_EXAMPLE, ""
        if can_varlen and no_triton:
            name, reason = VARLEN, f"not triton: {no_triton}; "
    if name == PER_EXAMPLE and window:
        raise UserError(
            f"the model attends over a sliding window of {window} tokens, which packed rows support with triton and varlen attention "
            f"only (CUDA, bf16 or fp16); here it is {where}. Train padded with --packing False."
        )
    return Choice("attention", name, reason + where)


def triton_problem(head_dim: int) -> str | None:
    """Why sft/step/attention_kernel.py cannot run here; None when it can."""
    if head_dim not in TRITON_HEADS:
        return f"heads of {head_dim}, where it has {', '.join(map(str, TRITON_HEADS))}"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    compilers = [os.environ.get("CC"), "gcc", "clang", "cc"]
    if not any(compiler and shutil.which(compiler) for compiler in compilers):
        return "Triton needs a C compiler, and neither gcc nor clang is here"
    return None


def stock_attention(model: torch.nn.Module) -> contextlib.AbstractContextManager:
    """Give a model, wrapped or not, stock attention for a while: padded batches and generation have no `cu_seq_lens`."""
    return swapped(model.config, _attn_implementation="sdpa")  # what each layer looks up when it is called

"""Attention within the examples of a packed row, for the lengths that instructions have: Triton kernels.

FlashAttention's backward pass works on blocks of 128 tokens, of which a short example fills one or two. Here a block holds a few
tokens with all the heads that share a key (grouped queries), keys and values are read once for the group, and a block begins
anywhere in the row: each token knows where its example starts and ends. Two numbers for each token are all the mask there is.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from transformers import AttentionInterface

TRITON = "triton"
NO_WINDOW = 2**30
BLOCKS = {  # by padded head size: rows (tokens x grouped heads) and keys of a block, as measured on an H100 (benchmarks/LOG.md)
    64: {
        "forward": {"rows": 64, "KEYS": 32, "num_warps": 4, "num_stages": 3},
        "queries": {"rows": 64, "KEYS": 32, "num_warps": 4, "num_stages": 3},
        "keys": {"rows": 128, "KEYS": 64, "num_warps": 4, "num_stages": 2},
    },
    128: {
        "forward": {"rows": 64, "KEYS": 64, "num_warps": 4, "num_stages": 1},
        "queries": {"rows": 64, "KEYS": 32, "num_warps": 4, "num_stages": 1},
        "keys": {"rows": 64, "KEYS": 64, "num_warps": 4, "num_stages": 2},
    },
}


# Names in the kernels: T tokens, H heads, G of them share a key head, D is the head size; GP and DP are G and D padded to a power
# of two. A pointer has the strides of its (tokens, heads, head size) tensor beside it: _t for a token, _h for a head.


@triton.jit(do_not_specialize=["T", "window"])
def _edges(cu_seq_lens, first_seen, seen_until, T, window, STEP: tl.constexpr):
    """For each token the first one that it sees, and the end of those that see it."""
    example = tl.program_id(0)
    start = tl.load(cu_seq_lens + example)
    end = tl.load(cu_seq_lens + example + 1)
    for begin in range(start, end, STEP):
        token = begin + tl.arange(0, STEP)
        tl.store(first_seen + token, tl.maximum(start, token - window + 1), token < end)
        tl.store(seen_until + token, tl.minimum(end, token + window), token < end)


@triton.jit
def _load(pointer, token, head, stride_t, stride_h, there, D: tl.constexpr, DP: tl.constexpr):
    """(rows, DP): one head of one token in each row."""
    size = tl.arange(0, DP)
    where = token.to(tl.int64)[:, None] * stride_t + head[:, None] * stride_h + size[None, :]
    return tl.load(pointer + where, there[:, None] & (size < D)[None, :], other=0.0)


@triton.jit
def _store(pointer, rows, token, head, stride_t, stride_h, there, D: tl.constexpr, DP: tl.constexpr):
    size = tl.arange(0, DP)
    where = token.to(tl.int64)[:, None] * stride_t + head[:, None] * stride_h + size[None, :]
    tl.store(pointer + where, rows.to(pointer.dtype.element_ty), there[:, None] & (size < D)[None, :])


@triton.jit(do_not_specialize=["T"])
def _forward(
    q, q_t, q_h, k, k_t, k_h, v, v_t, v_h, out, out_t, out_h, log_sums, first_seen, scale, T,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, TOKENS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Output, and the logarithm (base 2) of each softmax's sum; `scale` is to base 2 too."""
    first = tl.program_id(0) * TOKENS
    group = tl.program_id(1)
    row = tl.arange(0, TOKENS * GP)
    token, head = first + row // GP, group * G + row % GP
    there = (token < T) & (row % GP < G)
    queries = _load(q, token, head, q_t, q_h, there, D, DP)
    start = tl.load(first_seen + token, token < T, other=T)
    end = tl.minimum(first + TOKENS, T)
    best = tl.full([TOKENS * GP], -1e30, tl.float32)  # finite: a block may hold nothing that a row sees
    total = tl.zeros([TOKENS * GP], tl.float32)
    result = tl.zeros([TOKENS * GP, DP], tl.float32)
    for begin in range(tl.load(first_seen + first), end, KEYS):
        column = begin + tl.arange(0, KEYS)
        keys = _load(k, column, group + 0 * column, k_t, k_h, column < end, D, DP)
        values = _load(v, column, group + 0 * column, v_t, v_h, column < end, D, DP)
        seen = (column[None, :] >= start[:, None]) & (column[None, :] <= token[:, None])
        scores = tl.where(seen, tl.dot(queries, tl.trans(keys)) * scale, -float("inf"))
        new_best = tl.maximum(best, tl.max(scores, 1))
        weights = tl.math.exp2(scores - new_best[:, None])
        shrink = tl.math.exp2(best - new_best)
        total = total * shrink + tl.sum(weights, 1)
        result = result * shrink[:, None] + tl.dot(weights.to(values.dtype), values)
        best = new_best
    total = tl.where(there, total, 1.0)
    _store(out, result / total[:, None], token, head, out_t, out_h, there, D, DP)
    tl.store(log_sums + head * T + token, best + tl.math.log2(total), there)


@triton.jit(do_not_specialize=["T"])
def _backward_queries(
    q, q_t, q_h, k, k_t, k_h, v, v_t, v_h, out, out_t, out_h, d_out, d_out_t, d_out_h, d_q, d_q_t, d_q_h,
    log_sums, products, first_seen, scale, T,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, TOKENS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The queries' gradient, and for `_backward_keys` the product of each output with its gradient."""
    first = tl.program_id(0) * TOKENS
    group = tl.program_id(1)
    row = tl.arange(0, TOKENS * GP)
    token, head = first + row // GP, group * G + row % GP
    there = (token < T) & (row % GP < G)
    queries = _load(q, token, head, q_t, q_h, there, D, DP)
    gradient = _load(d_out, token, head, d_out_t, d_out_h, there, D, DP)
    output = _load(out, token, head, out_t, out_h, there, D, DP)
    product = tl.sum(output.to(tl.float32) * gradient.to(tl.float32), 1)
    tl.store(products + head * T + token, product, there)
    log_sum = tl.load(log_sums + head * T + token, there, other=0.0)
    start = tl.load(first_seen + token, token < T, other=T)
    end = tl.minimum(first + TOKENS, T)
    result = tl.zeros([TOKENS * GP, DP], tl.float32)
    for begin in range(tl.load(first_seen + first), end, KEYS):
        column = begin + tl.arange(0, KEYS)
        keys = _load(k, column, group + 0 * column, k_t, k_h, column < end, D, DP)
        values = _load(v, column, group + 0 * column, v_t, v_h, column < end, D, DP)
        seen = (column[None, :] >= start[:, None]) & (column[None, :] <= token[:, None])
        scores = tl.dot(queries, tl.trans(keys)) * (scale * 1.4426950408889634)
        weights = tl.where(seen, tl.math.exp2(scores - log_sum[:, None]), 0.0)
        d_scores = weights * (tl.dot(gradient, tl.trans(values)) - product[:, None])
        result += tl.dot(d_scores.to(keys.dtype), keys)
    _store(d_q, result * scale, token, head, d_q_t, d_q_h, there, D, DP)


@triton.jit(do_not_specialize=["T"])
def _backward_keys(
    q, q_t, q_h, k, k_t, k_h, v, v_t, v_h, d_out, d_out_t, d_out_h, d_k, d_k_t, d_k_h, d_v, d_v_t, d_v_h,
    log_sums, products, seen_until, scale, T,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, TOKENS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The gradients of keys and values, summed over the heads that share them."""
    first = tl.program_id(0) * KEYS
    group = tl.program_id(1)
    column = first + tl.arange(0, KEYS)
    keys = _load(k, column, group + 0 * column, k_t, k_h, column < T, D, DP)
    values = _load(v, column, group + 0 * column, v_t, v_h, column < T, D, DP)
    until = tl.load(seen_until + column, column < T, other=0)
    end = tl.load(seen_until + tl.minimum(first + KEYS, T) - 1)
    keys_result = tl.zeros([KEYS, DP], tl.float32)
    values_result = tl.zeros([KEYS, DP], tl.float32)
    row = tl.arange(0, TOKENS * GP)
    head = group * G + row % GP
    for begin in range(first, end, TOKENS):
        token = begin + row // GP
        there = (token < end) & (row % GP < G)
        queries = _load(q, token, head, q_t, q_h, there, D, DP)
        gradient = _load(d_out, token, head, d_out_t, d_out_h, there, D, DP)
        log_sum = tl.load(log_sums + head * T + token, there, other=0.0)
        product = tl.load(products + head * T + token, there, other=0.0)
        seen = (token[None, :] >= column[:, None]) & (token[None, :] < until[:, None]) & there[None, :]
        scores = tl.dot(keys, tl.trans(queries)) * (scale * 1.4426950408889634)
        weights = tl.where(seen, tl.math.exp2(scores - log_sum[None, :]), 0.0)
        values_result += tl.dot(weights.to(gradient.dtype), gradient)
        d_scores = weights * (tl.dot(values, tl.trans(gradient)) - product[None, :])
        keys_result += tl.dot(d_scores.to(queries.dtype), queries)
    _store(d_k, keys_result * scale, column, group + 0 * column, d_k_t, d_k_h, column < T, D, DP)
    _store(d_v, values_result, column, group + 0 * column, d_v_t, d_v_h, column < T, D, DP)


# ---------------------------------------------------------------------------------------------------- as PyTorch operators


def _with_strides(*tensors: torch.Tensor) -> list[Any]:
    """Each tensor, followed by its strides for a token and a head."""
    assert all(tensor.stride(2) == 1 for tensor in tensors)
    return [argument for tensor in tensors for argument in (tensor, *tensor.stride()[:2])]


def _sizes(q: torch.Tensor, k: torch.Tensor, kernel: str) -> dict[str, int]:
    heads, head_dim = q.shape[1:]
    shared = heads // k.shape[1]
    padded, size = triton.next_power_of_2(shared), max(16, triton.next_power_of_2(head_dim))
    blocks = dict(BLOCKS[max(64, size)][kernel])
    tokens = max(1, blocks.pop("rows") // padded)
    return {"G": shared, "GP": padded, "D": head_dim, "DP": size, "TOKENS": tokens, **blocks}


@torch.library.custom_op("sft::packed_attention", mutates_args=())
def packed_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seq_lens: torch.Tensor, scale: float, window: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Causal attention within each example of a packed row.

    Args:
        q: (tokens, heads, head size), of at most 128.
        k, v: (tokens, key heads, head size).
        cu_seq_lens: (examples + 1,), int32, where each example starts and the last one ends.
        window: how many tokens a token sees, itself among them.

    Returns:
        output as q; log2 of the softmax sums, (heads, tokens); for each token the first one that it sees and the end of those
        that see it, (2, tokens), int32. The last two are for the backward pass.
    """
    tokens, heads, _ = q.shape
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    log_sums = torch.empty(heads, tokens, dtype=torch.float32, device=q.device)
    edges = torch.empty(2, tokens, dtype=torch.int32, device=q.device)
    _edges[(len(cu_seq_lens) - 1,)](cu_seq_lens, *edges, tokens, window, STEP=256)
    sizes = _sizes(q, k, "forward")
    grid = (triton.cdiv(tokens, sizes["TOKENS"]), k.shape[1])
    _forward[grid](*_with_strides(q, k, v, out), log_sums, edges[0], scale * 1.4426950408889634, tokens, **sizes)
    return out, log_sums, edges


@torch.library.custom_op("sft::packed_attention_backward", mutates_args=())
def packed_attention_backward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, log_sums: torch.Tensor, edges: torch.Tensor,
    d_out: torch.Tensor, scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The gradients of q, k and v."""
    tokens = q.shape[0]
    d_q, d_k, d_v = (torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in (q, k, v))
    products = torch.empty_like(log_sums)
    sizes = _sizes(q, k, "queries")
    grid = (triton.cdiv(tokens, sizes["TOKENS"]), k.shape[1])
    tensors = _with_strides(q, k, v, out, d_out, d_q)
    _backward_queries[grid](*tensors, log_sums, products, edges[0], scale, tokens, **sizes)
    sizes = _sizes(q, k, "keys")
    grid = (triton.cdiv(tokens, sizes["KEYS"]), k.shape[1])
    tensors = _with_strides(q, k, v, d_out, d_k, d_v)
    _backward_keys[grid](*tensors, log_sums, products, edges[1], scale, tokens, **sizes)
    return d_q, d_k, d_v


@packed_attention.register_fake
def _shapes(q, k, v, cu_seq_lens, scale, window):
    tokens, heads, _ = q.shape
    return (
        q.new_empty(q.shape),
        q.new_empty((heads, tokens), dtype=torch.float32),
        q.new_empty((2, tokens), dtype=torch.int32),
    )


@packed_attention_backward.register_fake
def _gradient_shapes(q, k, v, out, log_sums, edges, d_out, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, _, scale, _ = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.scale = scale
    ctx.set_materialize_grads(False)  # nobody takes the gradient of the other two outputs


def _backward(ctx: Any, d_out: torch.Tensor, *_: None) -> tuple:
    return *packed_attention_backward(*ctx.saved_tensors, d_out, ctx.scale), None, None, None


packed_attention.register_autograd(_backward, setup_context=_keep)


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,  # (1, heads, tokens, head_dim)
    key: torch.Tensor,  # (1, key heads, tokens, head_dim)
    value: torch.Tensor,  # as key
    attention_mask: None,
    scaling: float,
    cu_seq_lens_q: torch.Tensor | None = None,  # (examples + 1,), int32
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """`packed_attention` as transformers calls a kernel; (1, tokens, heads, head_dim) in the compute type."""
    assert cu_seq_lens_q is not None and query.shape[0] == 1, "this attention takes one packed row with its cu_seq_lens"
    # Query and key leave the rotary embedding in float32 under autocast.
    dtype = torch.get_autocast_dtype(query.device.type) if torch.is_autocast_enabled(query.device.type) else value.dtype
    q, k, v = (tensor[0].transpose(0, 1).to(dtype) for tensor in (query, key, value))
    return packed_attention(q, k, v, cu_seq_lens_q, scaling, sliding_window or NO_WINDOW)[0][None], None


AttentionInterface.register(TRITON, attention)

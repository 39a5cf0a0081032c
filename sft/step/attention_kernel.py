"""Compute attention within the examples of a packed row, for the lengths that instructions have: Triton kernels.

FlashAttention's backward pass works on blocks of 128 tokens, of which a short example fills one or two. Here a block holds a few
tokens with all the heads that share a key (grouped queries), keys and values are read once for the group, and a block begins
anywhere in the row: each token knows where its example starts and ends, and where the beginning lies that an example before holds
for its own (sft/step/packed_rows.py). Four numbers for each token are all the mask there is.
"""

from typing import Any

import torch
import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
BLOCKS = {  # by head size: rows (tokens x grouped heads) and keys of a block, as measured on an H100 (benchmarks/LOG.md)
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
}  # all fit the 99 KiB of shared memory that a block has on consumer cards


@triton.jit(do_not_specialize=["window", "T"])
def _edges(
    cu_seq_lens, prefix_starts, prefix_lengths, edges, window, T, SHARED: tl.constexpr, STEP: tl.constexpr
):  # fmt: skip
    """Fill `edges`, which is zero before."""
    example = tl.program_id(0)
    start = tl.load(cu_seq_lens + example)
    end = tl.load(cu_seq_lens + example + 1)
    prefix, shared = 0, 0
    if SHARED:
        prefix = tl.load(prefix_starts + example)
        shared = tl.load(prefix_lengths + example)
        for begin in range(prefix, prefix + shared, STEP):
            token = begin + tl.arange(0, STEP)
            tl.atomic_max(edges + T + token, tl.full([STEP], 0, tl.int32) + end, token < prefix + shared)
        prefix = tl.where(shared > 0, prefix, 0)
    for begin in range(start, end, STEP):
        token = begin + tl.arange(0, STEP)
        there = token < end
        tl.store(edges + token, tl.maximum(start, token - window + 1), there)
        tl.atomic_max(edges + T + token, tl.minimum(end, token + window), there)
        tl.store(edges + 2 * T + token, tl.full([STEP], 0, tl.int32) + prefix, there)
        tl.store(edges + 3 * T + token, tl.full([STEP], 0, tl.int32) + prefix + shared, there)


@triton.jit
def _sight(edges, token, T):
    """What each row's token sees: its own example from here on, and its prefix from here to there."""
    start = tl.load(edges + token, token < T, other=T)
    return start, tl.load(edges + 2 * T + token, token < T, other=0), tl.load(edges + 3 * T + token, token < T, other=0)


@triton.jit
def _blocks_seen(edges, first, T, KEYS: tl.constexpr, TOKENS: tl.constexpr):
    """Of a block of queries: its first token's prefix and where that ends, the first token that it sees of its own example, the
    block's end, and how many blocks of keys the prefix and all of it have. What its other tokens see lies there too."""
    prefix, until = tl.load(edges + 2 * T + first), tl.load(edges + 3 * T + first)
    own, end = tl.load(edges + first), tl.minimum(first + TOKENS, T)
    before = tl.cdiv(until - prefix, KEYS)
    return prefix, until, own, end, before, before + tl.cdiv(end - own, KEYS)


@triton.jit
def _columns(block, prefix, until, own, end, before, KEYS: tl.constexpr):
    """Tokens of a block of keys, and whether they are there: the prefix's blocks first, then the example's own."""
    begin = tl.where(block < before, prefix + block * KEYS, own + (block - before) * KEYS)
    column = begin + tl.arange(0, KEYS)
    return column, column < tl.where(block < before, until, end)


@triton.jit
def _sees(token, column, there, start, prefix, until):
    """(rows, keys): whether a row's token sees a key."""
    own = (column[None, :] >= start[:, None]) & (column[None, :] <= token[:, None])
    shared = (column[None, :] >= prefix[:, None]) & (column[None, :] < until[:, None])
    return (own | shared) & there[None, :]


@triton.jit
def _rows(first, end, group, G: tl.constexpr, GP: tl.constexpr, TOKENS: tl.constexpr):
    """Token and head of each row of a block of queries, and whether there is one."""
    row = tl.arange(0, TOKENS * GP)
    token = first + row // GP
    return token, group * G + row % GP, (token < end) & (row % GP < G)


@triton.jit
def _load(pointer, token, head, heads, there, D: tl.constexpr):
    """(rows, D): one head of one token in each row."""
    where = (token.to(tl.int64) * heads + head)[:, None] * D + tl.arange(0, D)[None, :]
    return tl.load(pointer + where, there[:, None], other=0.0)


@triton.jit
def _store(pointer, rows, token, head, heads, there, D: tl.constexpr):
    where = (token.to(tl.int64) * heads + head)[:, None] * D + tl.arange(0, D)[None, :]
    tl.store(pointer + where, rows.to(pointer.dtype.element_ty), there[:, None])


@triton.jit(do_not_specialize=["T"])
def _forward(
    q, k, v, out, log_sums, edges, scale, T,
    K: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Output, and the logarithm (base 2) of each softmax's sum; `scale` is to base 2 too."""
    first = tl.program_id(0) * TOKENS
    group = tl.program_id(1)
    token, head, there = _rows(first, T, group, G, GP, TOKENS)
    queries = _load(q, token, head, K * G, there, D)
    start, shared_from, shared_until = _sight(edges, token, T)
    prefix, until, own, end, before, blocks = _blocks_seen(edges, first, T, KEYS, TOKENS)
    best = tl.full([TOKENS * GP], -1e30, tl.float32)  # finite: a block may hold nothing that a row sees
    total = tl.zeros([TOKENS * GP], tl.float32)
    result = tl.zeros([TOKENS * GP, D], tl.float32)
    for block in range(blocks):
        column, key_there = _columns(block, prefix, until, own, end, before, KEYS)
        keys = _load(k, column, group, K, key_there, D)
        values = _load(v, column, group, K, key_there, D)
        seen = _sees(token, column, key_there, start, shared_from, shared_until)
        scores = tl.where(seen, tl.dot(queries, tl.trans(keys)) * scale, -float("inf"))
        new_best = tl.maximum(best, tl.max(scores, 1))
        weights = tl.math.exp2(scores - new_best[:, None])
        shrink = tl.math.exp2(best - new_best)
        total = total * shrink + tl.sum(weights, 1)
        result = result * shrink[:, None] + tl.dot(weights.to(values.dtype), values)
        best = new_best
    total = tl.where(there, total, 1.0)
    _store(out, result / total[:, None], token, head, K * G, there, D)
    tl.store(log_sums + head * T + token, best + tl.math.log2(total), there)


@triton.jit(do_not_specialize=["T"])
def _backward_queries(
    q, k, v, out, d_out, d_q, log_sums, products, edges, scale, T,
    K: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The queries' gradient, and for `_backward_keys` the product of each output with its gradient."""
    first = tl.program_id(0) * TOKENS
    group = tl.program_id(1)
    token, head, there = _rows(first, T, group, G, GP, TOKENS)
    queries = _load(q, token, head, K * G, there, D)
    gradient = _load(d_out, token, head, K * G, there, D)
    output = _load(out, token, head, K * G, there, D)
    product = tl.sum(output.to(tl.float32) * gradient.to(tl.float32), 1)
    tl.store(products + head * T + token, product, there)
    log_sum = tl.load(log_sums + head * T + token, there, other=0.0)
    start, shared_from, shared_until = _sight(edges, token, T)
    prefix, until, own, end, before, blocks = _blocks_seen(edges, first, T, KEYS, TOKENS)
    result = tl.zeros([TOKENS * GP, D], tl.float32)
    for block in range(blocks):
        column, key_there = _columns(block, prefix, until, own, end, before, KEYS)
        keys = _load(k, column, group, K, key_there, D)
        values = _load(v, column, group, K, key_there, D)
        seen = _sees(token, column, key_there, start, shared_from, shared_until)
        scores = tl.dot(queries, tl.trans(keys)) * (scale * LOG2_E)
        weights = tl.where(seen, tl.math.exp2(scores - log_sum[:, None]), 0.0)
        d_scores = weights * (tl.dot(gradient, tl.trans(values)) - product[:, None])
        result += tl.dot(d_scores.to(keys.dtype), keys)
    _store(d_q, result * scale, token, head, K * G, there, D)


@triton.jit(do_not_specialize=["T"])
def _backward_keys(
    q, k, v, d_out, d_k, d_v, log_sums, products, edges, scale, T,
    K: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, TOKENS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """The gradients of keys and values, summed over the heads that share them."""
    first = tl.program_id(0) * KEYS
    group = tl.program_id(1)
    column = first + tl.arange(0, KEYS)
    keys = _load(k, column, group, K, column < T, D)
    values = _load(v, column, group, K, column < T, D)
    until = tl.load(edges + T + column, column < T, other=0)
    end = tl.max(until, 0)
    keys_result = tl.zeros([KEYS, D], tl.float32)
    values_result = tl.zeros([KEYS, D], tl.float32)
    for begin in range(first, end, TOKENS):
        token, head, there = _rows(begin, end, group, G, GP, TOKENS)
        queries = _load(q, token, head, K * G, there, D)
        gradient = _load(d_out, token, head, K * G, there, D)
        log_sum = tl.load(log_sums + head * T + token, there, other=0.0)
        product = tl.load(products + head * T + token, there, other=0.0)
        seen = (token[None, :] >= column[:, None]) & (token[None, :] < until[:, None]) & there[None, :]
        scores = tl.dot(keys, tl.trans(queries)) * (scale * LOG2_E)
        weights = tl.where(seen, tl.math.exp2(scores - log_sum[None, :]), 0.0)
        values_result += tl.dot(weights.to(gradient.dtype), gradient)
        d_scores = weights * (tl.dot(values, tl.trans(gradient)) - product[None, :])
        keys_result += tl.dot(d_scores.to(queries.dtype), queries)
    _store(d_k, keys_result * scale, column, group, K, column < T, D)
    _store(d_v, values_result, column, group, K, column < T, D)


def _sizes(q: torch.Tensor, k: torch.Tensor, kernel: str) -> dict[str, int]:
    (heads, head_dim), key_heads = q.shape[1:], k.shape[1]
    shared = heads // key_heads
    padded = triton.next_power_of_2(shared)
    blocks = dict(BLOCKS[max(64, head_dim)][kernel])
    tokens = max(1, blocks.pop("rows") // padded)
    return {"K": key_heads, "G": shared, "GP": padded, "D": head_dim, "TOKENS": tokens, **blocks}


@torch.library.custom_op("sft::packed_attention", mutates_args=())
def packed_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seq_lens: torch.Tensor,
    prefix_starts: torch.Tensor | None, prefix_lengths: torch.Tensor | None, scale: float, window: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Causal attention within each example of a packed row.

    Args:
        q: (tokens, heads, head size), which is 16, 32, 64 or 128.
        k, v: (tokens, key heads, head size).
        cu_seq_lens: (examples + 1,), int32, where each example starts and the last one ends.
        prefix_starts, prefix_lengths: (examples + 1,), int32, tokens of an example before that each example sees as its own
            beginning. Those who share one's beginning lie behind it side by side, and none shares more of it than the one before.
        window: how many tokens a token sees, itself among them. With prefixes it must not be less than the row.

    Returns:
        output as q. For the backward pass: log2 of the softmax sums, (heads, tokens), and `edges`, (4, tokens), int32.
    """
    q, k, v = q.contiguous(), k.contiguous(), v.contiguous()  # as they come out of the layers: nothing is copied
    tokens, heads, _ = q.shape
    out = torch.empty_like(q)
    log_sums = torch.empty(heads, tokens, dtype=torch.float32, device=q.device)
    edges = torch.zeros(4, tokens, dtype=torch.int32, device=q.device)
    shared = prefix_lengths is not None
    prefixes = (prefix_starts, prefix_lengths) if shared else (cu_seq_lens, cu_seq_lens)
    _edges[(len(cu_seq_lens) - 1,)](cu_seq_lens, *prefixes, edges, window, tokens, SHARED=shared, STEP=256)
    sizes = _sizes(q, k, "forward")
    grid = (triton.cdiv(tokens, sizes["TOKENS"]), k.shape[1])
    _forward[grid](q, k, v, out, log_sums, edges, scale * LOG2_E.value, tokens, **sizes)
    return out, log_sums, edges


@torch.library.custom_op("sft::packed_attention_backward", mutates_args=())
def packed_attention_backward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, log_sums: torch.Tensor,
    edges: torch.Tensor, d_out: torch.Tensor, scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """The gradients of q, k and v."""
    q, k, v, d_out = q.contiguous(), k.contiguous(), v.contiguous(), d_out.contiguous()
    tokens, key_heads, _ = k.shape
    d_q, d_k, d_v, products = (torch.empty_like(tensor) for tensor in (q, k, v, log_sums))
    sizes = _sizes(q, k, "queries")
    grid = (triton.cdiv(tokens, sizes["TOKENS"]), key_heads)
    _backward_queries[grid](q, k, v, out, d_out, d_q, log_sums, products, edges, scale, tokens, **sizes)
    sizes = _sizes(q, k, "keys")
    grid = (triton.cdiv(tokens, sizes["KEYS"]), key_heads)
    _backward_keys[grid](q, k, v, d_out, d_k, d_v, log_sums, products, edges, scale, tokens, **sizes)
    return d_q, d_k, d_v


@packed_attention.register_fake
def _shapes(q, k, v, cu_seq_lens, prefix_starts, prefix_lengths, scale, window):
    tokens, heads, _ = q.shape
    return (
        q.new_empty(q.shape),
        q.new_empty((heads, tokens), dtype=torch.float32),
        q.new_empty((4, tokens), dtype=torch.int32),
    )


@packed_attention_backward.register_fake
def _gradient_shapes(q, k, v, out, log_sums, edges, d_out, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple, output: tuple) -> None:
    q, k, v, *_, scale, _ = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.scale = scale
    ctx.set_materialize_grads(False)  # nobody takes the gradient of the other outputs


def _backward(ctx: Any, d_out: torch.Tensor, *_: None) -> tuple:
    return *packed_attention_backward(*ctx.saved_tensors, d_out, ctx.scale), *[None] * 5


packed_attention.register_autograd(_backward, setup_context=_keep)

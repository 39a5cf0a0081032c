"""The Triton kernels give each example's own attention: interpreted on a CPU, compiled on a GPU.

    TRITON_INTERPRET=1 PYTHONPATH=.:tests/support python tests/step/test_attention_kernel.py    # without a GPU

Triton decides at its import whether to interpret, so on a CPU the comparison runs in a process of its own.
"""

import pytest
import torch
import torch.nn.functional as F
from interpreted import relative_error, run_interpreted

LENGTHS = [[5, 30, 1, 70, 17], [130, 3], [2, 2]]
# Of the first lengths: which example holds each one's prefix, and how much of it. 30 before 1, 70 and 17, in blocks of 8 tokens and more.
PREFIXES = [(0, 0), (0, 0), (1, 30), (1, 21), (1, 9)]
HEADS = [(4, 1, 16), (6, 2, 32), (4, 4, 64), (2, 2, 128)]  # heads, key heads, head size


def errors(
    lengths: list[int],
    heads: int,
    key_heads: int,
    head_dim: int,
    window: int | None,
    device: str,
    prefixes: list | None = None,
) -> list:
    """Of the output and the gradients of q, k and v, against one example after another in float64."""
    from sft.step import attention, attention_kernel

    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    torch.manual_seed(sum(lengths))
    tokens, scale = sum(lengths), 0.7 * head_dim**-0.5
    shapes = [(tokens, heads, head_dim), *[(tokens, key_heads, head_dim)] * 2]
    q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for shape in shapes)
    gradient = torch.randn(shapes[0], device=device, dtype=dtype)
    cu_seq_lens = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    seen = window or attention.NO_WINDOW
    shared = (None, None)
    if prefixes:
        shared = [torch.tensor(edge, device=device, dtype=torch.int32) for edge in zip(*prefixes)]
        shared[0] = cu_seq_lens[shared[0]]
    out = attention_kernel.packed_attention(q, k, v, cu_seq_lens, *shared, scale, seen)[0]
    found = [out, *torch.autograd.grad(out, (q, k, v), gradient)]

    a, b, c = (tensor.detach().double().requires_grad_() for tensor in (q, k, v))
    alone = []
    parts = [tensor.split(lengths) for tensor in (a, b, c)]
    for number, (leader, before) in enumerate(prefixes or [(0, 0)] * len(lengths)):
        keys, values = (torch.cat([part[leader][:before], part[number]]) for part in parts[1:])
        distance = torch.arange(len(keys), device=device)
        distance = distance[before:, None] - distance[None]
        x, y, z = (rows.transpose(0, 1)[None] for rows in (parts[0][number], keys, values))
        mask = (distance >= 0) & (distance < seen)
        alone.append(F.scaled_dot_product_attention(x, y, z, attn_mask=mask, scale=scale, enable_gqa=True))
    expected = torch.cat(alone, dim=2)[0].transpose(0, 1)
    reference = [expected, *torch.autograd.grad(expected, (a, b, c), gradient.double())]
    return [relative_error(*pair) for pair in zip(found, reference)]


def compare(device: str, limit: float) -> None:
    for lengths in LENGTHS:
        for heads in HEADS:
            for window in (None, 9) if lengths == LENGTHS[0] else (None,):
                worst = max(errors(lengths, *heads, window, device))
                print(lengths, heads, window, f"{worst:.1e}")
                assert worst < limit, (lengths, heads, window, worst)  # NaN is not below it
    for heads in HEADS:
        worst = max(errors(LENGTHS[0], *heads, None, device, PREFIXES))
        print(LENGTHS[0], heads, "shared prefixes", f"{worst:.1e}")
        assert worst < limit, (heads, worst)
    assert error_when_joined(device) > 0.1, "examples that see each other pass too: the comparison proves nothing"


def error_when_joined(device: str) -> float:
    """How far the output moves when two examples of 130 and 3 tokens are called one."""
    from sft.step import attention, attention_kernel

    torch.manual_seed(0)
    q, k, v = torch.randn(3, 133, 2, 16, device=device, dtype=torch.float32 if device == "cpu" else torch.bfloat16)
    starts = (torch.tensor(edges, dtype=torch.int32, device=device) for edges in ([0, 133], [0, 130, 133]))
    calls = [(q, k, v, edges, None, None, 0.25, attention.NO_WINDOW) for edges in starts]
    joined, apart = (attention_kernel.packed_attention(*call)[0][130:] for call in calls)
    return relative_error(joined, apart)


def compare_in_a_model() -> None:
    """A LLaMA's loss and gradients with this kernel and with one attention call for each example, whose prompts begin alike."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from sft.step import attention, attention_kernel  # noqa: F401  the kernels' names, and the operator
    from sft.step.packed_rows import PackedCollator, group_by_prefix

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "vocab_size": 100}
    model = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **shape))
    ids = torch.randint(0, 100, (44,))
    examples = [{"input_ids": torch.cat([ids[:10], part])} for part in ids.split([5, 9, 30])]
    for example in examples:
        example["labels"] = torch.where(torch.arange(len(example["input_ids"])) < 12, -100, example["input_ids"])
    batch = PackedCollator(group_by_prefix)(examples)
    assert batch["prefix_lengths"].tolist() == [0, 10, 10, 0]
    row = {name: value for name, value in batch.items() if not name.startswith("label")}
    found = []
    for kernel in ("triton", "per_example"):
        model.config._attn_implementation = kernel
        loss = model(**row, use_cache=False).logits.logsumexp(-1).sum()
        found.append(torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss, [*model.parameters()])]))
    assert relative_error(*found) < 1e-6


@pytest.mark.slow
def test_interpreted():
    assert len(run_interpreted(__file__).splitlines()) == (len(LENGTHS) + 2) * len(HEADS)


@pytest.mark.slow
@pytest.mark.parametrize("heads, key_heads, head_dim", [(32, 4, 64), (32, 32, 128), (14, 2, 64)])
def test_the_kernels_fit_consumer_cards(heads, key_heads, head_dim):
    """Compiled for cards that are not here; a block has 99 KiB of shared memory on the smallest of them (8.6)."""
    pytest.importorskip("triton")
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from sft.step import attention_kernel as ours

    q, k = torch.empty(1, heads, head_dim), torch.empty(1, key_heads, head_dim)
    kernels = {"forward": ours._forward, "queries": ours._backward_queries, "keys": ours._backward_keys}
    types = {"T": "i32", "scale": "fp32", "log_sums": "*fp32", "products": "*fp32"}
    types["edges"] = "*i32"
    for name, kernel in kernels.items():
        sizes = ours._sizes(q, k, name)
        options = {option: sizes.pop(option) for option in ("num_warps", "num_stages")}
        signature = {a: "constexpr" if a in sizes else types.get(a, "*bf16") for a in kernel.arg_names}
        aligned = {(i,): [["tt.divisibility", 16]] for i, a in enumerate(kernel.arg_names) if signature[a][0] == "*"}
        source = ASTSource(fn=kernel, signature=signature, constexprs=sizes, attrs=aligned)
        for capability, limit in ((86, 99), (90, 227)):
            binary = compile(source, target=GPUTarget("cuda", capability, 32), options=options)
            assert 0 < binary.metadata.shared <= limit * 1024, (name, capability)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compiled Triton needs a GPU")
def test_compiled():
    compare("cuda", 1e-2)


if __name__ == "__main__":
    compare_in_a_model()
    compare("cpu", 1e-6)

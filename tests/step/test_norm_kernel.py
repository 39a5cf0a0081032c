"""The norm's backward kernel gives the norm's own gradients, alone and in compiled layers: interpreted on a CPU, compiled on a GPU.

    TRITON_INTERPRET=1 PYTHONPATH=.:tests/support python tests/step/test_norm_kernel.py    # without a GPU

Triton decides at its import whether to interpret, so on a CPU the comparison runs in a process of its own. Its interpreter (3.9)
cuts float32 to bf16 where a GPU rounds, so it is asked for float32 alone.
"""

import copy

import pytest
import torch
from interpreted import relative_error, run_interpreted
from packed_models import small_llama

SHAPES = [(44, 48), (3, 300), (70, 64)]  # tokens, width


def errors(tokens: int, width: int, gradients: int, residual: bool, device: str) -> list[float]:
    """Of the gradients of hidden states and weight, against float64; the first again against one without the residual."""
    from sft.step.norm_kernel import norm_backward

    torch.manual_seed(tokens)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    several = [torch.randn(1, tokens, width, device=device, dtype=dtype) for _ in range(gradients + 1)]
    *parts, stream = several
    hidden = torch.randn(1, tokens, width, device=device, dtype=dtype)
    weight = torch.randn(width, device=device)
    exact = [tensor.double().requires_grad_() for tensor in (hidden, weight)]
    rstd = (exact[0].pow(2).mean(-1, keepdim=True) + 1e-5).rsqrt()
    expected = list(torch.autograd.grad(exact[1] * exact[0] * rstd, exact, sum(part.double() for part in parts)))
    alone = expected[0]
    expected[0] = alone + stream if residual else alone
    found = norm_backward(parts, stream if residual else None, hidden, rstd.detach().float(), weight)
    return [*(relative_error(*pair) for pair in zip(found, expected)), relative_error(found[0], alone)]


def compare(device: str, limit: float) -> None:
    for tokens, width in SHAPES:
        for gradients in (1, 2, 3):
            for residual in (False, True):
                of_hidden, of_weight, without = errors(tokens, width, gradients, residual, device)
                assert max(of_hidden, of_weight) < limit, (tokens, width, gradients, residual, of_hidden, of_weight)
                assert without > 0.1 or not residual, "a residual left out passes too: the comparison proves nothing"


def compare_in_compiled_layers() -> None:
    """A LLaMA's gradients with this kernel in compiled layers and with stock layers; and what the kernel adds up itself."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from sft.step import attention, compiled_layers, norm_kernel  # noqa: F401  attention registers its kernels
    from sft.step.loss import summed_loss
    from sft.step.modules import exchange
    from sft.step.packed_rows import PackedCollator

    torch.manual_seed(0)
    shape = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    stock = LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, vocab_size=100, attn_implementation="sdpa", **shape))
    for weight in stock.parameters():
        if weight.dim() == 1:  # norms whose weights are all one would hide half of it
            weight.data += 0.3 * torch.randn_like(weight)
    model = copy.deepcopy(stock)
    exchange(model, fused_norms=True)
    compiled_layers.compile_layers(model, fused_norms=True)
    kernel, launched = norm_kernel._backward, []

    class Recorded:
        def __getitem__(self, grid: tuple[int]):
            def launch(*args, **sizes):
                launched.append((sizes["GRADIENTS"], sizes["RESIDUAL"]))
                kernel[grid](*args, **sizes)

            return launch

    norm_kernel._backward = Recorded()
    for lengths in ([5, 9, 30], [7, 8], [4, 4, 4, 41]):
        examples = [torch.randint(0, 100, (length,)) for length in lengths]
        batch = PackedCollator()([{"input_ids": ids, "labels": ids.clone()} for ids in examples])
        found = []
        for each in (model, stock):
            loss = summed_loss(each, exchange(each), batch)
            gradients = torch.autograd.grad(loss, [*each.parameters()])
            found.append(torch.cat([gradient.flatten() for gradient in gradients]))
        assert relative_error(*found) < 1e-6, (lengths, relative_error(*found))
    # from the end: the final norm; in each layer the norm before the MLP (gate and up), and the one before attention
    assert launched == 3 * [(1, False), *3 * [(2, True), (3, True)]], launched


@pytest.mark.slow
def test_interpreted():
    assert run_interpreted(__file__).splitlines()[-1] == "all compared"


def test_only_llamas_norm_is_taken():
    pytest.importorskip("triton")
    from transformers.models.llama.modeling_llama import LlamaRMSNorm
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

    from sft.step.modules import exchange
    from sft.step.norm_kernel import FusedNorm

    model = small_llama()
    model.model.layers[0].input_layernorm = Qwen2RMSNorm(48)
    stock = copy.deepcopy(model.model.norm)
    exchange(model, fused_norms=True)
    assert isinstance(model.model.norm, FusedNorm) and isinstance(model.model.norm, LlamaRMSNorm)
    assert type(model.model.layers[0].input_layernorm) is Qwen2RMSNorm
    hidden = torch.randn(3, 48)
    assert torch.equal(model.model.norm(hidden), stock(hidden)), "forward is the stock one, to the bit"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="compiled Triton needs a GPU")
def test_compiled():
    compare("cuda", 1e-2)


if __name__ == "__main__":
    compare("cpu", 1e-6)
    compare_in_compiled_layers()
    print("all compared")

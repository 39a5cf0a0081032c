"""Compiled layers give the gradients of eager ones, and what `NormPass` changes in their graphs."""

import operator
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.utils import counters
from torch.fx import Graph
from transformers import LlamaConfig, LlamaForCausalLM

from sft.step import compiled_layers
from sft.step.loss import summed_loss
from sft.step.modules import exchange
from sft.step.packed_rows import PackedCollator

ATEN = torch.ops.aten


def test_layers_are_compiled_where_that_pays():
    """A billion weights and 80 million tokens on two GPUs: 6 x 1e9 x 8e7 / (2 x 2e14) = 1,200 s of work."""

    def chosen(tokens=8e7, quantized=False, device="cuda", **flags) -> tuple[bool, str]:
        args = {"compile_layers": None, "world_size": 2, "deepspeed": None, "torch_compile": False}
        zero3 = SimpleNamespace(is_zero3=lambda: flags.get("deepspeed") == "zero3")
        args = SimpleNamespace(**(args | flags), device=torch.device(device), hf_deepspeed_config=zero3)
        return compiled_layers.choose_compilation(args, 10**9, quantized, tokens)[1:]

    assert chosen()[0] and chosen(deepspeed="zero2")[0]
    assert chosen(tokens=1.6e7)[0]  # 240 s
    assert chosen(tokens=1.5e7) == (False, "about 225 s of work, and the compiler takes 30")
    assert chosen(tokens=1.5e7, world_size=1)[0]  # of twice the work for each
    assert chosen(quantized=True) == (False, "4-bit weights")
    assert chosen(deepspeed="zero3") == (False, "ZeRO-3 gathers weights inside the layers")
    assert chosen(torch_compile=True) == (False, "--torch_compile compiles the whole model")
    assert chosen(device="cpu") == (False, "on a CPU compiling takes longer than it saves")
    for asked in (True, False):  # wins over everything
        assert chosen(tokens=1, quantized=True, device="cpu", compile_layers=asked) == (asked, "--compile_layers")


def test_the_residual_stream_has_the_compute_type_under_autocast_alone():
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    )
    compiled_layers.keep_residual_in_compute_type(model)
    embed, ids = model.get_input_embeddings(), torch.tensor([[1]])
    assert embed(ids).dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert embed(ids).dtype == torch.bfloat16


def norm_graph(terms: int, residual_first: bool) -> Graph:
    """The sum of so many gradients reaches a norm, whose result is added to what the residual stream has."""
    pytest.importorskip("triton")
    from sft.step import norm_kernel  # noqa: F401  registers the operator

    graph, value = Graph(), torch.empty(1, 2, 3)

    def call(target, *args, val=value):
        node = graph.call_function(target, args)
        node.meta["val"] = val
        return node

    given = [graph.placeholder(f"primals_{number}") for number in range(terms + 3)]
    for node in given:
        node.meta["val"] = value
    *gradients, hidden, rstd, weight = given
    total = gradients[0]
    for gradient in gradients[1:]:
        total = call(ATEN.add.Tensor, total, gradient)
    stream = call(ATEN.neg.default, hidden) if residual_first else None
    norm = call(torch.ops.sft.norm_backward.default, [total], None, hidden, rstd, weight, val=(value, value))
    result = call(operator.getitem, norm, 0)
    stream = stream or call(ATEN.neg.default, hidden)
    graph.output((call(ATEN.add.Tensor, stream, result), call(operator.getitem, norm, 1)))
    compiled_layers.NormPass()(graph)
    graph.lint()
    return graph


@pytest.mark.parametrize("terms, residual_first, left", [(3, True, 0), (2, True, 0), (4, True, 3), (2, False, 1)])
def test_a_norms_kernel_takes_sums_that_it_can(terms, residual_first, left):
    """Up to three gradients, and a residual that is there when the kernel runs; others are added as they were."""
    graph = norm_graph(terms, residual_first)
    assert len(graph.find_nodes(op="call_function", target=ATEN.add.Tensor)) == left
    (norm,) = graph.find_nodes(op="call_function", target=torch.ops.sft.norm_backward.default)
    assert (len(norm.args[0]), norm.args[1] is not None) == (terms if terms <= 3 else 1, residual_first)


@pytest.mark.slow
def test_compiled_layers_give_the_eager_gradients():
    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 12, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(num_key_value_heads=2, vocab_size=100, **shape))
    model.config._attn_implementation = "sdpa"  # per_example asks for its lengths, which no graph can hold
    head = exchange(model)
    compiled_layers.keep_residual_in_compute_type(model)
    batches = []
    for lengths in ([5, 9, 30], [7, 8], [4, 4, 4, 41]):
        examples = [torch.randint(0, 100, (length,)) for length in lengths]
        batches.append(PackedCollator()([{"input_ids": ids, "labels": ids.clone()} for ids in examples]))

    def gradients(batch, bf16: bool) -> torch.Tensor:
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            summed_loss(model, head, batch).backward()
        return torch.cat([weight.grad.flatten() for weight in model.parameters()])

    torch._dynamo.reset()
    counters.clear()
    references, eager = ([gradients(batch, bf16) for batch in batches] for bf16 in (False, True))
    compiled_layers.compile_layers(model)
    for batch, reference, rounded in zip(batches, references, eager, strict=True):
        error, usual = ((found - reference).norm() / reference.norm() for found in (gradients(batch, True), rounded))
        assert 0 < error < 1.2 * usual, "as exact as eager bf16, and not the same kernels"
    assert counters["stats"]["unique_graphs"] == 3, "one of the eleven layers, one of the last, and the norm's"

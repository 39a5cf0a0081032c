"""What a layer keeps for its backward pass is measured without memory, and is what real layers keep."""

import pytest
import torch
from plans import OPEN_LLAMA_7B, TINY, flags
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    Qwen3Config,
)

from sft.plan import memory, model_sizes
from sft.step import compiled_layers

pytestmark = pytest.mark.usefixtures("installed")


def test_a_shape_is_the_models():
    shape = model_sizes.Shape(OPEN_LLAMA_7B)
    # the published size of LLaMA 7B; a layer has 4 h h + 3 h i weights and 2 h norms
    assert (
        shape.parameters == 6_738_415_616 == 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 2 * 32000 * 4096 + 4096
    )
    assert (shape.embedding, shape.head, shape.hidden) == (32000 * 4096, 32000 * 4096, 4096)
    assert shape.adapters == 32 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
    assert model_sizes.Shape(OPEN_LLAMA_7B, ["q_proj", "v_proj"]).adapters == 32 * 2 * (4096 + 4096)


TOKENS = 128


def kept_bytes(
    layers: int,
    dtype: torch.dtype,
    autocast: bool,
    lora: bool = False,
    compiled: bool = False,
    padded: bool = False,
    **more,
) -> int:
    """Bytes that a model's forward pass keeps for backward, weights and their casts left out."""
    config = LlamaConfig(num_hidden_layers=layers, **TINY)
    model = LlamaForCausalLM(config).to(dtype)
    inner = model
    if lora:
        peft = pytest.importorskip("peft")
        inner = peft.get_peft_model(
            model, peft.LoraConfig(r=1, target_modules="all-linear", task_type="CAUSAL_LM", **more)
        )
        inner = inner.get_base_model()
    ids, mask = torch.randint(0, 64, (1, TOKENS)), None
    if padded:
        ids, mask = ids.view(2, -1), torch.ones(2, TOKENS // 2, dtype=torch.int64)
        mask[1, 50:] = 0
    else:
        compiled_layers.keep_residual_in_compute_type(inner)
    if compiled:
        compiled_layers.compile_layers(inner)
    inner.train()
    sizes = {tuple(p.shape) for p in model.parameters()}
    sizes |= {tuple(reversed(size)) for size in sizes}
    kept: dict[int, int] = {}
    tensors = []  # kept alive, so that no address is used twice

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tuple(tensor.shape) not in sizes:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            tensors.append(tensor)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        inner.model(input_ids=ids, attention_mask=mask, use_cache=False)
    return sum(kept.values())


SHAPE = model_sizes.Shape(LlamaConfig(num_hidden_layers=2, **TINY))


H, INNER, Q, K = 256, 688, 256, 64


@pytest.mark.parametrize(
    ("half", "autocast", "padded", "by_hand"),
    [
        (True, True, False, 22 * H + 8 * INNER + 4 * Q + 4 * K),  # every cast of a norm's output is a copy of its own
        (True, False, False, 16 * H + 8 * INNER + 4 * Q + 4 * K),
        (False, False, False, 24 * H + 16 * INNER + 8 * Q + 8 * K),
        (True, True, True, 26 * H + 8 * INNER + 8 * Q),  # the residual stream in float32, keys and values for each head
        (True, False, True, 16 * H + 8 * INNER + 8 * Q),
        (False, False, True, 24 * H + 16 * INNER + 16 * Q),
    ],
)
def test_a_layer_keeps_the_bytes_that_are_counted_without_memory(half, autocast, padded, by_hand):
    planned = model_sizes.kept_by_a_layer(SHAPE, half, autocast, padded)
    # besides: two root mean squares of 4 bytes, a log-sum of 4 for each of 8 heads, the mask's row of 251 keys
    assert planned == pytest.approx(by_hand + 8 + 32 + padded * (2 if half else 4) * 251, abs=8)
    dtype = torch.bfloat16 if half and not autocast else torch.float32
    real = (kept_bytes(3, dtype, autocast, padded=padded) - kept_bytes(2, dtype, autocast, padded=padded)) / TOKENS
    assert 0 <= real - by_hand <= 8 + 32 + 14 * 2 + 4 * 64 * padded  # a mask of 64 keys


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"dtype": torch.bfloat16, "autocast": True, "lora": True}, ["--use_lora", "True", "--lora_r", "1", "--lora_dropout", "0"]),
        pytest.param({"dtype": torch.float32, "autocast": True, "compiled": True}, ["--compile_layers", "True"], marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_coefficients_of_compiled_layers_and_of_lora(how, words):
    real = (kept_bytes(3, **how) - kept_bytes(2, **how)) / TOKENS
    planned, *_ = memory.activation_bytes(SHAPE, memory.Setting(vars(flags(*words))))
    assert planned == pytest.approx(real, rel=0.04)


@pytest.mark.parametrize("kind", [Qwen3Config, GPTNeoXConfig, GPT2Config])
def test_any_architecture_is_measured(kind):
    shape = model_sizes.Shape(kind(num_hidden_layers=3, vocab_size=1000))
    one, two = (model_sizes.kept_by_a_layer(shape, half, False, False) for half in (True, False))
    assert 20 * shape.hidden < one < two


def test_lora_dropout_keeps_a_mask():
    # a GPU keeps one byte for each element (native_dropout), the CPU a float
    how = {"dtype": torch.bfloat16, "autocast": True, "lora": True}
    dropped = {**how, "lora_dropout": 0.1}
    masks = kept_bytes(3, **dropped) - kept_bytes(2, **dropped) - (kept_bytes(3, **how) - kept_bytes(2, **how))
    with_mask, without = (
        memory.activation_bytes(SHAPE, memory.Setting(vars(flags("--use_lora", "True", "--lora_dropout", rate))))[0]
        for rate in ("0.1", "0")
    )
    assert masks / TOKENS / 4 == with_mask - without == 5 * H + INNER + Q


def test_a_mixture_of_experts_keeps_what_is_counted_without_memory():
    """Rows come once for each of a token's two experts; the experts' weights, one above the other, are no activations."""
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MixtralConfig(num_hidden_layers=2, vocab_size=1000, num_local_experts=8, sliding_window=None, **shape)
    planned = model_sizes.kept_by_a_layer(model_sizes.Shape(config), True, False, False)
    assert model_sizes.Shape(config).experts == 2 * 8 * 3 * 64 * 128
    real = []
    for layers in (2, 1):
        options = {"dtype": torch.bfloat16, "attn_implementation": "memory_plan"}
        model = AutoModelForCausalLM.from_config(model_sizes.with_layers(config, layers), **options).train()
        weights, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

        def note(tensor: torch.Tensor, weights=weights, kept=kept) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                kept[storage.data_ptr()] = tensor
            return tensor

        compiled_layers.keep_residual_in_compute_type(model)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            model.base_model(input_ids=torch.zeros(1, model_sizes.MEASURED_TOKENS, dtype=torch.int64), use_cache=False)
        real.append(sum(tensor.untyped_storage().nbytes() for tensor in kept.values()))
    assert planned == pytest.approx((real[0] - real[1]) / model_sizes.MEASURED_TOKENS, rel=0.02)


def test_a_mixtures_float32_weights_are_measured_in_16_bits_without_a_traceback(caplog):
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = MixtralConfig(num_hidden_layers=2, vocab_size=1000, num_local_experts=8, sliding_window=None, **shape)
    of = model_sizes.Shape(config)
    held = model_sizes.kept_by_a_layer(of, True, False, False)
    assert model_sizes.kept_by_a_layer(of, False, False, False) == 2 * held
    assert model_sizes.kept_by_a_layer(of, True, True, False) == 1.2 * held
    assert not caplog.records

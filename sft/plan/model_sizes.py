"""Count a model's parameters and what one of its layers keeps for backward, from its config alone."""

import copy
import logging
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AttentionInterface, AutoModelForCausalLM, PreTrainedConfig
from transformers.models.llama.modeling_llama import LlamaMLP

from sft.job import swapped
from sft.step.compiled_layers import keep_residual_in_compute_type

MEASURED_TOKENS = 251  # no width of a model, to be taken for a weight's


class NotMeasured(Exception):
    """Why a model cannot be measured."""


class Shape:
    """Sizes of a model, in parameters unless a comment says otherwise.

    Args:
        targets: --lora_target_modules; None or ["all-linear"] are all linear layers but the head.

    Raises:
        NotMeasured: an architecture that transformers does not have.
    """

    def __init__(self, config: PreTrainedConfig, targets: list[str] | None = None):
        architecture = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
        if architecture is None or not isinstance(getattr(config, "num_hidden_layers", None), int):
            raise NotMeasured("transformers has no causal language model for this config")
        # `from_config` would split it among the ranks under ZeRO-3 (transformers 5.23)
        with torch.device("meta"):
            model = architecture(config)
        embedding, output = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m.weight is not output}
        everything = targets in (None, ["all-linear"])
        adapted = [m for n, m in linear.items() if everything or n in targets or n.rsplit(".", 1)[-1] in targets]
        self.config, self.layers = config, config.num_hidden_layers  # number of them
        self.vocabulary, self.hidden = embedding.shape  # ids, width
        self.tensors = [p.numel() for p in model.parameters()]  # tied ones count once
        self.parameters = sum(self.tensors)
        self.embedding = embedding.numel()
        self.head = 0 if output is embedding else output.numel()
        self.linear = sum(m.weight.numel() for m in linear.values())  # without the head
        self.takes_liger = any(type(module) is LlamaMLP for module in model.modules())  # sft/step/modules.py
        # of mixtures: no `nn.Linear`, and never in 4 bits
        self.experts = sum(p.numel() for p in model.parameters() if p.dim() == 3)
        self.largest_linear = max((m.weight.numel() for m in linear.values()), default=0)
        self.adapter_inputs = sum(m.in_features for m in adapted)  # width of all inputs of adapted layers
        self.adapters = self.adapter_inputs + sum(m.out_features for m in adapted)  # that LoRA adds at rank 1


def with_layers(config: PreTrainedConfig, layers: int) -> PreTrainedConfig:
    """The config of a model of the same shape with so many layers."""
    config, each = copy.deepcopy(config), config.num_hidden_layers
    config.num_hidden_layers = layers
    for name, value in list(vars(config).items()):
        if "layer" in name and isinstance(value, list) and len(value) == each:  # such as layer_types
            setattr(config, name, value[:layers])
    return config


def _attend_in_one(module: torch.nn.Module, query, key, value, *_: Any, **__: Any) -> tuple[torch.Tensor, None]:
    """Keeps what the kernels for packed rows keep: key and value once for the heads that share them."""
    query, key = query.to(value.dtype), key.to(value.dtype)
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2), None


AttentionInterface.register("memory_plan", _attend_in_one)


@cache
def kept_by_a_layer(shape: Shape, half: bool, autocast: bool, padded: bool) -> float:
    """Bytes that one token leaves for backward in one decoder layer, the difference of two layers and one.

    Weights and their casts are left out: they do not grow with the tokens. No ZeRO-3 may be announced meanwhile: it would
    split the model (sft/model/loading.py).
    """
    why = f"a layer of {type(shape.config).__name__} cannot be measured without memory"
    try:
        two, one = (_kept(with_layers(shape.config, layers), half, autocast, padded) for layers in (2, 1))
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        if autocast or not half:
            # Without memory, torch (2.13) multiplies a mixture's experts of 16 bits only. Of dense layers autocast keeps a fifth more.
            return (1.2 if half else 2.0) * kept_by_a_layer(shape, True, False, padded)
        raise NotMeasured(why) from error
    return (two - one) / MEASURED_TOKENS


def _kept(config: PreTrainedConfig, half: bool, autocast: bool, padded: bool) -> int:
    """Bytes that a model keeps for backward, counted on tensors without memory."""
    kept, mask = {}, None
    options: dict[str, Any] = {"dtype": torch.bfloat16 if half and not autocast else torch.float32}
    if not padded:
        options["attn_implementation"] = "memory_plan"
    failures = logging.getLogger("torch._subclasses.fake_tensor")  # are raised, and logged with a traceback as well
    with (
        swapped(failures, disabled=True),
        FakeTensorMode(),
        torch.device("cpu"),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        model = AutoModelForCausalLM.from_config(config, **options).train()
        # also transposed, and those of experts one above the other
        weights = {
            tuple(size) for p in model.parameters() for size in (p.shape, p.mT.shape if p.dim() > 1 else p.shape)
        }

        def note(tensor: torch.Tensor) -> torch.Tensor:
            if tuple(tensor.shape) not in weights:
                storage = tensor.untyped_storage()
                kept[id(storage)] = storage  # alive, so that no identity is used twice
            return tensor

        if padded:
            mask = torch.ones(1, 1, MEASURED_TOKENS, MEASURED_TOKENS, dtype=torch.bool)
        else:
            keep_residual_in_compute_type(model)
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            ids = torch.zeros(1, MEASURED_TOKENS, dtype=torch.int64)
            model.base_model(input_ids=ids, attention_mask=mask, use_cache=False)
    return sum(storage.nbytes() for storage in kept.values())

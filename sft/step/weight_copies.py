"""Float32 weights cast to the compute type once in each optimizer step.

Autocast casts them in each micro-batch. Here each linear layer keeps a copy, as many bytes as autocast's, which is renewed when the
weights have changed.
"""

import torch
from transformers import TrainerCallback

from sft.step.modules import CastLinear


class Casts(TrainerCallback):
    """The copies of one model's weights. Before a forward pass they are renewed where the optimizer has run since, or weights were loaded.

    Args:
        model: on its device; its linear layers without bias whose weight is trained get copies.
        head: from `labelled_head`; gets one too, which its loss uses.
        dtype: autocast's.
    """

    def __init__(self, model: torch.nn.Module, head: torch.nn.Module, dtype: torch.dtype):
        self.dtype, self.renewed = dtype, 0
        self.seen: list[tuple[int, int]] = []  # version and place of each weight when it was copied
        self.layers = [head] if head.plain and head.weight.requires_grad else []
        for module in model.modules():
            if type(module) is torch.nn.Linear and module.weight.requires_grad and module.bias is None:
                module.__class__ = CastLinear
                self.layers.append(module)
        model.register_forward_pre_hook(lambda *_: self.renew())

    def on_optimizer_step(self, *_, **__):
        self.seen = []  # some optimizers' kernels leave a weight's version as it was

    def renew(self) -> None:
        """Cast all weights, if they may have changed."""
        weights = [layer.weight.detach() for layer in self.layers]
        state = [(weight._version, weight.data_ptr()) for weight in weights]
        if state == self.seen or not weights:
            return
        for layer, weight in zip(self.layers, weights):
            if layer.copy is None:
                layer.copy = torch.empty_like(weight, dtype=self.dtype)
                torch._dynamo.mark_static(layer.copy)  # as parameters: layers are not compiled for any width
        torch._foreach_copy_([layer.copy for layer in self.layers], weights)
        self.seen, self.renewed = state, self.renewed + 1


def keeps_casts(flags) -> bool:
    """Whether a run under autocast keeps 16-bit copies of its weights from one micro-batch to the next (sft/step/weight_copies.py).

    Where a padded step would be one micro-batch, autocast casts once too and lets go before all gradients are there: copies that are
    kept could fill a card that the padded run does not. With gradient checkpointing memory is short, and compiled layers kept their
    activations (torch 2.11, benchmarks/LOG.md).
    """
    several = flags.gradient_accumulation_steps > 1 or flags.tokens_per_micro_batch != "auto"
    return flags.packing and several and not flags.gradient_checkpointing and not flags.torch_compile

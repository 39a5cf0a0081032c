"""Float32 weights cast to the compute type once in each optimizer step, and their gradients float32 out of their products.

Autocast casts them in each micro-batch. Here each linear layer keeps a copy, as many bytes as autocast's, which is renewed when the
weights have changed. Which runs do so: `keeps_casts` in sft/arguments.py.
"""

from typing import Any

import torch
import torch.nn.functional as F
from transformers import TrainerCallback


class Product(torch.autograd.Function):
    """`rows @ weight.T` by a copy of the weight in the rows' type: (..., in) -> (..., out)."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weight: torch.Tensor, copy: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(rows, copy)
        return F.linear(rows, copy)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        rows, copy = ctx.saved_tensors
        factors = gradient.flatten(0, -2).T, rows.flatten(0, -2)
        if rows.is_cuda:  # summed in float32 anyway: no rounding, and no cast behind
            return gradient @ copy, torch.mm(*factors, out_dtype=torch.float32), None
        return gradient @ copy, torch.mm(*factors).float(), None


class CastLinear(torch.nn.Linear):
    """A linear layer without bias that under autocast multiplies with `copy`, of its float32 weight."""

    copy: torch.Tensor | None = None

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        if self.copy is None or not torch.is_autocast_enabled(rows.device.type):
            return super().forward(rows)
        return Product.apply(rows.to(self.copy.dtype), self.weight, self.copy)


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

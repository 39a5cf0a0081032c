"""The modules that a packed run exchanges for its own: output layer, last decoder layer, linear layers."""

from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from sft import IGNORE_INDEX
from sft.step.loss import SummedLoss


class LabelledHead(torch.nn.Module):
    """Mixed into the class of a model's output layer: while `targets` is set, its output is the sum of the losses.

    The loss is computed inside the layer's own call, so the hooks by which FSDP, ZeRO-3 and adapters bring in the layer's weights run.
    """

    positions: torch.Tensor | None = None
    targets: torch.Tensor | None = None
    plain = False  # an `nn.Linear` and nothing more: its weight may be used directly
    copy: torch.Tensor | None = None  # of its weight in the compute type: sft/step/weight_copies.py

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.targets is None:
            return super().forward(hidden, *args, **kwargs)
        if hidden.shape[1] != len(self.targets):  # the layer before was no `LabelledLayer`: it gave every position
            hidden = hidden[:, self.positions]
        rows = hidden.reshape(-1, hidden.shape[-1])
        if self.plain and self.bias is None:
            return SummedLoss.apply(rows, self.weight, self.copy, self.targets, torch.is_grad_enabled())
        # An adapter on the head, or a head of another kind: its own forward, recomputed in backward.
        logits_of = super().forward
        return sum(
            checkpoint(self._loss_of, logits_of, part, targets, use_reentrant=False)
            for part, targets in zip(rows.split(1024), self.targets.split(1024))
        )

    @staticmethod
    def _loss_of(logits_of: Any, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits_of(hidden).float(), targets, reduction="sum", ignore_index=IGNORE_INDEX)


def labelled_head(model: PreTrainedModel) -> LabelledHead:
    """Teach the model's output layer to give the loss; its parameters and their names stay as they are."""
    head = model.get_output_embeddings()
    if not isinstance(head, LabelledHead):
        kind = type(head)
        head.__class__ = type(kind.__name__, (LabelledHead, kind), {"plain": kind is torch.nn.Linear})
    return head


class LabelledLayer(LlamaDecoderLayer):
    """A last decoder layer that gives the `label_positions` of a packed row alone: (1, tokens, hidden) -> (1, trained tokens, hidden).

    Attention needs every position; the additions, norm and MLP after it do not: 37 % of an MLP's work on instructions.
    """

    def forward(
        self, hidden_states: torch.Tensor, *args: Any, label_positions: torch.Tensor | None = None, **kwargs: Any
    ) -> torch.Tensor:
        if label_positions is None:
            return super().forward(hidden_states, *args, **kwargs)
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), *args, **kwargs)
        rows = (hidden_states + attended)[:, label_positions]
        return rows + self.mlp(self.post_attention_layernorm(rows))


def labelled_layer(model: PreTrainedModel) -> None:
    """Teach the model's last layer to stop at labelled positions, where it is LLaMA's."""
    last = [None, *(module for module in model.modules() if isinstance(module, LlamaDecoderLayer))][-1]
    if type(last) is LlamaDecoderLayer:  # a class derived from it may have another forward
        last.__class__ = type(LlamaDecoderLayer.__name__, (LabelledLayer,), {})  # FSDP finds layers by that name


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

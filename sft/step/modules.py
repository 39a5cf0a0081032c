"""Exchange modules of the model for those of packed rows, all in one place: output layer, last decoder layer, norms, rope.

A module keeps its parameters, hooks, ties and names, and gets a class derived from its own. `exchange` is the only function that does so.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm

from sft.step.loss import LossOfLogits, SummedLoss, losses_and_gradient, of_bent_logits
from sft.step.rotary import RotaryOfExamples, depends_on_length


def exchange(
    model: PreTrainedModel, kernel: Callable = losses_and_gradient, fused_norms: bool = False, liger: bool = False
) -> "LossHead":
    """Give a model's modules what packed rows need. Modules of other classes than LLaMA's stay as they are.

    Args:
        kernel: computes losses and their gradient from logits (`loss.loss_kernel`).
        fused_norms: a norm's backward pass is one Triton kernel.
        liger: norms and MLPs are Liger's kernels.

    Returns: the output layer, whose output is the loss while `loss.summed_loss` runs.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, LossHead):
        head.plain = type(head) is torch.nn.Linear
        _become(head, LossHead)
    head.kernel, head.neutral = _with_the_models_logits(model, kernel)
    head.auxiliary = getattr(model.config, "router_aux_loss_coef", getattr(model.config, "aux_loss_coef", 0.0))
    last = [None, *(module for module in model.modules() if isinstance(module, LlamaDecoderLayer))][-1]
    if type(last) is LlamaDecoderLayer:  # a class derived from it may have another forward
        _become(last, LabelledLayer)
    for module in model.modules():
        if fused_norms and type(module) is LlamaRMSNorm:
            from sft.step.norm_kernel import FusedNorm  # it needs Triton

            _become(module, FusedNorm)
        if liger and type(module) in (LlamaRMSNorm, LlamaMLP):
            from sft.step.liger_modules import LigerMLP, LigerNorm  # it needs liger-kernel

            _become(module, LigerNorm if type(module) is LlamaRMSNorm else LigerMLP)
        if depends_on_length(module) and not isinstance(module, RotaryOfExamples):
            _become(module, RotaryOfExamples)
    return head


def _with_the_models_logits(model: PreTrainedModel, kernel: Callable) -> tuple[Callable, list[tuple[Any, str, Any]]]:
    """The kernel with what this model does to its logits after the head, and what keeps the model from doing it once more.

    Names of transformers 5.17 to 5.23; a model that does something else is found out by sft/plan/proof.py.
    """
    config, causal = model.config, getattr(model, "get_base_model", lambda: model)()
    scale, cap = 1.0, getattr(config, "final_logit_softcapping", None)
    neutral: list[tuple[Any, str, Any]] = []
    if cap is not None:
        neutral.append((config, "final_logit_softcapping", None))
    if hasattr(config, "logits_scaling"):
        scale = 1 / config.logits_scaling
        neutral.append((config, "logits_scaling", 1.0))
    if hasattr(causal, "logit_scale"):
        scale = causal.logit_scale
        neutral.append((causal, "logit_scale", 1.0))
    return of_bent_logits(kernel, scale, cap) if neutral else kernel, neutral


def _become(module: torch.nn.Module, kind: type) -> None:
    module.__class__ = _joined(kind, type(module))  # type: ignore[arg-type]


@functools.cache  # layers of one class share one compiled graph
def _joined(kind: type, base: type) -> type:
    return type(base.__name__, (kind, base), {})  # FSDP finds layers by that name


class LossHead(torch.nn.Module):
    """An output layer that gives the sum of the losses while `targets` is set.

    The loss is computed inside the layer's own call, so the hooks by which FSDP, ZeRO-3 and adapters bring in the layer's weights run.
    """

    positions: torch.Tensor | None = None
    targets: torch.Tensor | None = None
    plain = False  # an `nn.Linear` and nothing more: its weight may be used directly
    kernel: Callable
    # attributes of the model that hold a value of no effect while the loss is computed
    neutral: list[tuple[Any, str, Any]]
    auxiliary = 0.0  # weight of a router's loss

    def forward(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self.targets is None:
            return super().forward(hidden, *args, **kwargs)
        if hidden.shape[1] != len(self.targets):  # the layer before was no `LabelledLayer`: it gave every position
            hidden = hidden[:, self.positions]
        rows = hidden.reshape(-1, hidden.shape[-1])
        if self.plain and self.bias is None:
            return SummedLoss.apply(rows, self.weight, self.targets, self.kernel, torch.is_grad_enabled())
        # An adapter on the head, or a head of another kind: its own forward, recomputed in backward.
        logits_of = super().forward

        def loss_of(hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            return LossOfLogits.apply(logits_of(hidden), targets, self.kernel)

        parts = zip(rows.split(1024), self.targets.split(1024))
        return sum(checkpoint(loss_of, part, targets, use_reentrant=False) for part, targets in parts)


class LabelledLayer(torch.nn.Module):
    """LLaMA's last decoder layer, which gives the `label_positions` of a packed row alone: (1, tokens, hidden) -> (1, trained tokens, hidden).

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

"""Rope whose frequencies depend on a text's length: in a packed row each example has those that it has alone.

transformers (5.23, modeling_rope_utils.py) looks at the longest text of a batch: with "longrope" (Phi-3's long models) one above the original
length gives all of them the long factors, with "dynamic" the base follows it, and a shorter batch afterwards keeps it.
"""

from typing import Any

import torch
from transformers import PreTrainedConfig

from sft.job import UserError

KINDS = ("longrope", "dynamic")


def changes_beyond(config: PreTrainedConfig) -> int | None:
    """The length above which the frequencies are others; None where they never change."""
    parameters = getattr(config, "rope_parameters", None) or {}
    for each in [parameters, *(value for value in parameters.values() if isinstance(value, dict))]:
        if each.get("rope_type") == "longrope":
            return each["original_max_position_embeddings"]
        if each.get("rope_type") == "dynamic":
            return config.max_position_embeddings
    return None


class RotaryOfExamples(torch.nn.Module):
    """A model's rotary module, asked for each example of a packed row alone.

    position_ids (1, tokens), restarts at 0 for each example -> what the module gives, (1, tokens, head_dim) each
    """

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        limit = changes_beyond(self.config)
        if position_ids.shape[0] > 1 or position_ids.shape[1] == 1 or position_ids.max() < limit:
            # padded prompts, a token that is generated, or examples that all have the frequencies of short ones
            return super().forward(x, position_ids, *args, **kwargs)
        starts = (position_ids[0] == 0).nonzero().flatten().tolist()
        parts = []
        for start, end in zip(starts, [*starts[1:], position_ids.shape[1]], strict=True):
            self._forget()
            parts.append(super().forward(x[:, start:end], position_ids[:, start:end], *args, **kwargs))
        self._forget()
        return tuple(torch.cat(each, dim=1) for each in zip(*parts, strict=True))

    def _forget(self) -> None:
        """Go back to the frequencies of short texts; "dynamic" keeps the longest's."""
        if self.rope_type == "dynamic":
            self.inv_freq, self.max_seq_len_cached = self.original_inv_freq, self.original_max_seq_len


def depends_on_length(module: torch.nn.Module) -> bool:
    """Whether a module is rope of such a kind. Raises UserError where it is of a form that cannot be asked for each example."""
    kind = getattr(module, "rope_type", None)
    kinds = kind.values() if isinstance(kind, dict) else [kind]
    if isinstance(kind, dict) and "dynamic" in kinds:
        raise UserError('this model\'s rope of type "dynamic" depends on the longest row, in some layers only')
    return any(each in KINDS for each in kinds)

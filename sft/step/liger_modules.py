"""LLaMA's norm and MLP by Liger's Triton kernels: few passes over the activations where layers are not compiled."""

import torch
from liger_kernel.ops import LigerRMSNormFunction, LigerSiLUMulFunction


class LigerNorm(torch.nn.Module):
    """The output has the hidden states' type, to which the layers behind cast it anyway; its gradient is worked on in place."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return LigerRMSNormFunction.apply(hidden_states, self.weight, self.variance_epsilon, 0.0, "llama", True, None)


class LigerMLP(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(LigerSiLUMulFunction.apply(self.gate_proj(x), self.up_proj(x)))

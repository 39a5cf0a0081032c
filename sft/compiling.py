"""Decoder layers compiled one by one, and a residual stream in the compute type."""

from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

FLOPS_PER_S = 2e14  # what eager layers reach on a recent card; only to tell a short run from a long one
WORTH_SECONDS = 240  # compiling costs about 40 s and saves about a third of what follows (benchmarks/LOG.md)


class Choice(NamedTuple):
    """Whether layers are compiled, and why."""

    on: bool
    reason: str

    def __str__(self) -> str:
        return f"compiled layers: {'on' if self.on else 'off'} ({self.reason})"


def choose(requested: str, device: torch.device, parameters: int, tokens: int, obstacle: str | None = None) -> Choice:
    """Decide whether compiling pays.

    Args:
        requested: `--compile_layers`: auto, True or False.
        parameters: of the model.
        tokens: that one rank trains on in the whole run.
        obstacle: something in the run that compiled layers do not go with.
    """
    if requested != "auto":
        return Choice(requested == "True", "--compile_layers")
    if device.type != "cuda":
        return Choice(False, f"on a {device.type} the gain does not pay for the compiler")
    if obstacle:
        return Choice(False, obstacle)
    seconds = 6 * parameters * tokens / FLOPS_PER_S
    if seconds < WORTH_SECONDS:
        return Choice(False, f"about {seconds:.0f} s of work, and the compiler takes 40")
    return Choice(True, "the first step takes about 40 s longer, the others about a third less")


def decoder_layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The layers that FSDP wraps too, by the model's own list of their classes."""
    return [module for module in model.modules() if type(module).__name__ in set(model._no_split_modules or ())]


def compile_layers(model: PreTrainedModel) -> None:
    """Compile each decoder layer's forward: norms, rotary embedding, SwiGLU and casts become few kernels.

    One layer at a time, because the layers share one compiled graph (tens of seconds, not minutes), and the forward alone, because
    the hooks of FSDP and ZeRO stay outside. Token counts differ from step to step: `dynamic` compiles once for all.
    """
    for layer in decoder_layers(model):
        layer.forward = torch.compile(layer.forward, dynamic=True)


def keep_residual_in_compute_type(model: PreTrainedModel) -> None:
    """Cast the embeddings' output to autocast's type, so that the residual stream has it throughout, as under FSDP and DeepSpeed.

    Autocast alone leaves the stream in float32, because the embedding is no matrix product: twice the bytes in every norm and
    residual addition. The weights stay float32.
    """

    def cast(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        device = output.device.type
        return output.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else output

    model.get_input_embeddings().register_forward_hook(cast)

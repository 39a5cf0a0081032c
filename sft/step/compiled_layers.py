"""Compile the decoder layers one by one, and keep the residual stream in the compute type."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node
from transformers import PreTrainedModel

from sft.job import Choice

FLOPS_PER_S = 2e14  # what eager layers reach on a recent GPU; only to tell a short run from a long one
# Compiling takes about 30 s on 16 cores, and what follows little more than half the time (benchmarks/LOG.md).
WORTH_SECONDS = 240


def choose_compilation(args: Any, parameters: int, quantized: bool, tokens: float) -> Choice:
    """Decide whether compiling pays for a model of so many parameters, and `tokens` that all ranks together train on in the whole run."""
    seconds = 6 * parameters * tokens / (args.world_size * FLOPS_PER_S)
    if args.compile_layers is not None:
        on, why = args.compile_layers, "--compile_layers"
    elif args.device.type != "cuda":
        on, why = False, "on a CPU compiling takes longer than it saves"
    elif quantized:
        on, why = False, "4-bit weights"
    elif args.deepspeed and args.hf_deepspeed_config.is_zero3():
        on, why = False, "ZeRO-3 gathers weights inside the layers"
    elif args.torch_compile:
        on, why = False, "--torch_compile compiles the whole model"
    elif seconds < WORTH_SECONDS:
        on, why = False, f"about {seconds:.0f} s of work, and the compiler takes 30"
    else:
        on, why = True, "the first step takes about 30 s longer, the others little more than half as long"
    return Choice("compiled layers", on, why)


class NormPass(CustomGraphPass):
    """A change to a layer's graph, forward and backward together, that the compiler (torch 2.11 to 2.13) leaves undone.

    A norm's backward kernel adds up the gradients that reach the norm, and the residual stream's, itself.
    """

    def __call__(self, graph: Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=torch.ops.sft.norm_backward.default):
            add_in_norm(node)
        graph.eliminate_dead_code()

    def uuid(self) -> bytes:
        return get_hash_for_files((__file__,))


def add_in_norm(norm: Node) -> None:
    """Give a norm's backward kernel (sft/step/norm_kernel.py) the terms of two sums: of what reaches it, and of its result and the residual's."""
    cast = torch.ops.prims.convert_element_type.default

    def is_sum(node: Node) -> bool:
        if node.target is not torch.ops.aten.add.Tensor or len(node.all_input_nodes) != 2:
            return False
        values = [part.meta["val"] for part in (node, *node.all_input_nodes)]
        return all(value.shape == values[0].shape and value.dtype == values[0].dtype for value in values)

    def terms(node: Node) -> list[Node]:
        if len(node.users) == 1 and is_sum(node):
            return [term for part in node.args for term in terms(part)]
        if len(node.users) == 1 and node.target is cast and node.meta["val"].dtype == torch.float32:
            return [node.args[0]]
        return [node]

    gradients, residual = terms(norm.args[0][0]), None  # the kernel takes three gradients
    for result in [user for user in norm.users if user.args[1] == 0 and len(user.users) == 1]:
        total = next(iter(result.users))
        other = [term for term in total.args if term is not result]
        if is_sum(total) and other[0] < norm:  # it is there when the kernel runs
            residual = other[0]
            total.replace_all_uses_with(result)
    with norm.graph.inserting_before(norm):
        arguments = gradients if len(gradients) <= 3 else norm.args[0], residual, *norm.args[2:]
        joined = norm.graph.call_function(norm.target, arguments)
    # not "eager_input_vals", by which the compiler would cut the list to its old length without a word (torch 2.13, lowering.py)
    joined.meta["val"] = norm.meta["val"]
    norm.replace_all_uses_with(joined)


# These kernels are no faster here, and are compiled anew where a row crosses 2,560 or 4,096 tokens (torch 2.11, scheduler.py).
OPTIONS: dict[str, Any] = {"triton.mix_order_reduction": False}
# One object for all layers: with options of its own each layer would be compiled again, and the ninth not at all.
OPTIONS_WITH_FUSED_NORMS = OPTIONS | {"joint_custom_post_pass": NormPass()}
# A graph each for layers and the last one, with and without gradients, and for a placeholder's single position: past the compiler's
# limit, which is 8 for all of them together, a layer would go on uncompiled.
GRAPHS = 32


def more_graphs() -> AbstractContextManager:
    """While it lasts, layers may have as many graphs as they need."""
    return torch._dynamo.config.patch(recompile_limit=GRAPHS)


def compile_layers(model: PreTrainedModel, fused_norms: bool = False) -> None:
    """Compile each decoder layer's forward: norms, rotary embedding, SwiGLU and casts become few kernels.

    One layer at a time, because the layers share one compiled graph (tens of seconds, not minutes), and the forward alone, because
    the hooks of FSDP and ZeRO stay outside. Token counts differ from step to step: `dynamic` compiles once for all.
    """
    options = OPTIONS_WITH_FUSED_NORMS if fused_norms else OPTIONS
    final_norm = getattr(model.get_decoder(), "norm", None)  # LLaMA's name for it, and its relatives'
    wrapped = set(model._no_split_modules or ())  # the layers that FSDP wraps too
    layers = [module for module in model.modules() if type(module).__name__ in wrapped]
    for layer in filter(None, (*layers, final_norm)):
        layer.forward = torch.compile(layer.forward, dynamic=True, options=options)


def keep_residual_in_compute_type(model: PreTrainedModel) -> None:
    """Cast the embeddings' output to autocast's type, so that the residual stream has it throughout, as under FSDP and DeepSpeed.

    Autocast alone leaves the stream in float32, because the embedding is no matrix product: twice the bytes in every norm and
    residual addition. The weights stay float32.
    """

    def cast(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        device = output.device.type
        return output.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else output

    model.get_input_embeddings().register_forward_hook(cast)

"""Decoder layers compiled one by one, and a residual stream in the compute type."""

from typing import Any, NamedTuple

import torch
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch.fx import Graph, Node
from torch.utils.checkpoint import CheckpointPolicy
from transformers import PreTrainedModel

FLOPS_PER_S = 2e14  # what eager layers reach on a recent card; only to tell a short run from a long one


# Compiling takes about 30 s on 16 cores, and what follows little more than half the time (benchmarks/LOG.md).
WORTH_SECONDS = 240


class Choice(NamedTuple):
    """Whether layers are compiled, and why."""

    on: bool
    reason: str

    def __str__(self) -> str:
        return f"compiled layers: {'on' if self.on else 'off'} ({self.reason})"


def choose_compilation(args: Any, parameters: int, quantized: bool, tokens: float) -> Choice:
    """Decide whether compiling pays.

    Args:
        args: the run's TrainingArguments.
        parameters: of the model.
        quantized: it has 4-bit weights.
        tokens: that all ranks together train on in the whole run.
    """
    if args.compile_layers != "auto":
        return Choice(args.compile_layers == "True", "--compile_layers")
    if args.device.type != "cuda":
        return Choice(False, f"on a {args.device.type} the gain does not pay for the compiler")
    if quantized:
        return Choice(False, "4-bit weights")
    if args.deepspeed and args.hf_deepspeed_config.is_zero3():
        return Choice(False, "ZeRO-3 gathers weights inside the layers")
    if args.torch_compile:
        return Choice(False, "--torch_compile compiles the whole model")
    seconds = 6 * parameters * tokens / (args.world_size * FLOPS_PER_S)
    if seconds < WORTH_SECONDS:
        return Choice(False, f"about {seconds:.0f} s of work, and the compiler takes 30")
    return Choice(True, "the first step takes about 30 s longer, the others little more than half as long")


def prepare_layers(model: PreTrainedModel, device: torch.device, choice: Choice) -> None:
    """Make a model's layers fast for packed rows."""
    if device.type == "cuda":
        keep_residual_in_compute_type(model)
    if choice.on:
        compile_layers(model)


def decoder_layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    """The layers that FSDP wraps too, by the model's own list of their classes."""
    return [module for module in model.modules() if type(module).__name__ in set(model._no_split_modules or ())]


class LayerPass(CustomGraphPass):
    """Three changes to a layer's graph, forward and backward together, that the compiler (torch 2.11 to 2.13) leaves undone.

    The residual stream behind attention is kept for backward in place of what attention added to it: as many bytes, and three
    kernels read it where they would read two tensors and add them. Where autocast casts a weight (sft/step/weight_copies.py does in other runs), its
    gradient comes on a GPU in float32 out of its product, not in the compute type with a cast behind it. A norm's backward kernel adds up the gradients that reach the norm, and
    the residual stream's, itself.
    """

    def __call__(self, graph: Graph) -> None:
        aten, cast = torch.ops.aten, torch.ops.prims.convert_element_type.default
        for addition in graph.find_nodes(op="call_function", target=aten.add.Tensor):
            stream = addition.args[0]
            if stream.op != "placeholder" or stream.name.startswith("tangents"):
                continue  # not the layer's own input
            # where gradient checkpointing has had its say, that stays
            addition.meta.setdefault("recompute", CheckpointPolicy.MUST_SAVE)
        for widened in graph.find_nodes(op="call_function", target=cast):
            product, dtype = widened.args
            if product.target is not aten.mm.default or len(product.users) > 1 or dtype != torch.float32:
                continue
            if product.meta["val"].device.type == "cuda":
                with graph.inserting_before(widened):
                    direct = graph.call_function(aten.mm.dtype, (*product.args, torch.float32))
                direct.meta.update(widened.meta)
                widened.replace_all_uses_with(direct)
        for node in list(graph.nodes):
            if str(node.target) == "sft.norm_backward.default":
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


# One object for all layers: with options of its own each layer would be compiled again, and the ninth not at all.
OPTIONS = {
    "joint_custom_post_pass": LayerPass(),
    # These kernels are no faster here, and are compiled anew where a row crosses 2,560 or 4,096 tokens (torch 2.11, scheduler.py).
    "triton.mix_order_reduction": False,
}


def compile_layers(model: PreTrainedModel) -> None:
    """Compile each decoder layer's forward: norms, rotary embedding, SwiGLU and casts become few kernels.

    One layer at a time, because the layers share one compiled graph (tens of seconds, not minutes), and the forward alone, because
    the hooks of FSDP and ZeRO stay outside. Token counts differ from step to step: `dynamic` compiles once for all.
    """
    # A graph each for layers and the last one, with and without gradients, and for a placeholder's single position: past this
    # limit, which is 8 for all of them together, a layer would go on uncompiled.
    torch._dynamo.config.recompile_limit = 32
    final_norm = getattr(model.get_decoder(), "norm", None)  # LLaMA's name for it, and its relatives'
    for layer in filter(None, (*decoder_layers(model), final_norm)):
        layer.forward = torch.compile(layer.forward, dynamic=True, options=OPTIONS)


def keep_residual_in_compute_type(model: PreTrainedModel) -> None:
    """Cast the embeddings' output to autocast's type, so that the residual stream has it throughout, as under FSDP and DeepSpeed.

    Autocast alone leaves the stream in float32, because the embedding is no matrix product: twice the bytes in every norm and
    residual addition. The weights stay float32.
    """

    def cast(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        device = output.device.type
        return output.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else output

    model.get_input_embeddings().register_forward_hook(cast)

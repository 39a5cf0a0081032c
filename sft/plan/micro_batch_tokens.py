"""How many tokens one micro-batch may hold: the padded run's number, or on CUDA as many as measured memory has room for."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

LARGEST = 65_536  # tokens; the GPU is full far below, and tokens x feed-forward width stays within 32-bit indices


PROBES = (4_096, 8_192)  # tokens; long enough that the loss already works on whole chunks


class Budget(NamedTuple):
    """Tokens of one micro-batch at most, and why so many."""

    tokens: int
    reason: str


def choose_micro_batch_tokens(
    model: PreTrainedModel,
    args: Any,
    largest_step: int,
    prepare: Callable[[PreTrainedModel], None],
    trial: Callable[[PreTrainedModel, int], None],
    not_for_activations: Callable[[int], float] | None,
) -> Budget:
    """The budget that --tokens_per_micro_batch asks for. Every rank gets the smallest rank's answer.

    Under `auto` activations are measured, with forward and backward passes of one layer and of two on two numbers of tokens; the rest,
    most of which does not exist yet, is counted by the memory plan. The answer is never below the padded run's micro-batch, which must fit
    anyway.

    Args:
        args: the run's TrainingArguments.
        largest_step: tokens of one rank in the fullest step.
        prepare: makes a model compute as the real one does (compiled layers).
        trial: (model, tokens) -> runs forward and backward on one packed row, as training will.
        not_for_activations: (tokens) -> bytes of PyTorch's share of the card that the rest takes, or that stay free, when a micro-batch
            holds so many; None where there is no plan.
    """
    if args.tokens_per_micro_batch != "auto":
        return Budget(int(args.tokens_per_micro_batch), "--tokens_per_micro_batch")
    device, floor = args.device, args.per_device_train_batch_size * args.model_max_length
    if device.type != "cuda" or model.config._attn_implementation in ("sdpa", "eager"):
        return Budget(floor, "per device x --model_max_length")
    ceiling = min(largest_step, LARGEST)
    if ceiling <= floor:
        return Budget(floor, "per device x --model_max_length, more than any step has")
    if not_for_activations is None:
        return Budget(floor, "per device x --model_max_length; without a memory plan it does not grow")
    try:
        fixed, per_layer = activation_bytes(model, args, prepare, trial)
    except torch.OutOfMemoryError:  # a card that the weights nearly fill
        fixed = per_layer = 0.0
    per_token = fixed + per_layer * model.config.num_hidden_layers
    share = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    room = 0
    if per_layer > 0:
        room = int((share - not_for_activations(ceiling)) / per_token)
        if room < ceiling:  # several micro-batches in a step: gradients lie beside the activations
            room = max(0, int((share - not_for_activations(ceiling - 1)) / per_token))
    if args.world_size > 1:
        smallest = torch.tensor(room, device=device)
        torch.distributed.all_reduce(smallest, torch.distributed.ReduceOp.MIN)
        room = int(smallest)
    if room <= floor:
        return Budget(floor, "per device x --model_max_length; no room was found for more")
    measured = f"{per_token / 2**20:.2f} MiB per token, room for {room:,}"
    if room >= ceiling:
        return Budget(ceiling, f"auto: a whole step; {measured}")
    return Budget(room, f"auto: {measured}")


def activation_bytes(
    model: PreTrainedModel,
    args: transformers.TrainingArguments,
    prepare: Callable[[PreTrainedModel], None],
    trial: Callable[[PreTrainedModel, int], None],
) -> tuple[float, float]:
    """Peak bytes per token of everything but the layers, and of one layer; from the slopes of four measured peaks."""
    device = args.device
    with probe_model(model, args, prepare) as (probe, use_layers):
        training = probe.training
        probe.train()
        slopes = []
        for layers in (1, 2):
            use_layers(layers)
            trial(
                probe, PROBES[0]
            )  # compiles, and creates gradients and workspaces, which later peaks then have in common
            peaks = []
            for tokens in PROBES:
                torch.cuda.synchronize(device)
                torch.cuda.reset_peak_memory_stats(device)
                trial(probe, tokens)
                peaks.append(torch.cuda.max_memory_allocated(device))
            slopes.append((peaks[1] - peaks[0]) / (PROBES[1] - PROBES[0]))
        probe.zero_grad(set_to_none=True)
        probe.train(training)
    torch.cuda.empty_cache()
    per_layer = slopes[1] - slopes[0]
    return max(slopes[0] - per_layer, 0.0), per_layer


@contextlib.contextmanager
def probe_model(
    model: PreTrainedModel, args: transformers.TrainingArguments, prepare: Callable[[PreTrainedModel], None]
) -> Iterator[tuple[PreTrainedModel, Callable[[int], None]]]:
    """A model on the card of which one or two layers can be run: the real one, or a copy of its shape where that is on the CPU yet."""
    config = model.config
    layers = config.num_hidden_layers
    if next(model.parameters()).device.type == "cuda":

        def use_layers(count: int) -> None:
            config.num_hidden_layers = count  # the models of transformers run `self.layers[: config.num_hidden_layers]`

        try:
            yield model, use_layers
        finally:
            config.num_hidden_layers = layers
        return
    small = copy.deepcopy(config)
    small.num_hidden_layers = 2
    if getattr(small, "layer_types", None):
        small.layer_types = small.layer_types[:2]
    with torch.device(args.device):
        probe = AutoModelForCausalLM.from_config(
            small, attn_implementation=config._attn_implementation, dtype=torch.float32
        )
    prepare(probe)
    if model.is_gradient_checkpointing or (args.fsdp_config or {}).get("activation_checkpointing"):
        probe.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)

    def use_layers_of_probe(count: int) -> None:
        probe.config.num_hidden_layers = count

    yield probe, use_layers_of_probe

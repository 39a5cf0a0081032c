"""How many tokens one micro-batch may hold: the padded run's number, or on CUDA as many as measured memory has room for."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

GIB = 2**30
LARGEST = 65_536  # tokens; the GPU is full far below, and tokens x feed-forward width stays within 32-bit indices
SPARE = 0.08  # of the card: fragments of a cache whose pieces differ in size from step to step, communication buffers
PROBES = (4_096, 8_192)  # tokens; long enough that the loss already works on whole chunks


class Budget(NamedTuple):
    """Tokens of one micro-batch at most, and why so many."""

    tokens: int
    reason: str


class Engine(NamedTuple):
    """What a rank will hold beside activations, in bytes for each parameter of the whole model (each trained one, for the last two)."""

    weights: float  # still to be put on the card
    compute_copy: float  # 16-bit weights that autocast keeps for the backward pass, or that are gathered
    gradients: float
    optimizer: float


def engine(args: transformers.TrainingArguments, half: bool) -> Engine:
    """The bytes per parameter under plain or distributed data parallel, FSDP2 and ZeRO, with AdamW's two float32 moments."""
    ranks = args.world_size
    if args.deepspeed:
        config = args.hf_deepspeed_config
        stage = config.get_value("zero_optimization.stage", 0)
        here = 0 if config.is_offload() else 1
        sharded = [1 / ranks if stage >= least else 1.0 for least in (1, 2, 3)]
        # ZeRO holds 16-bit weights and gradients, and a float32 copy of the weights with the moments.
        return Engine(2 * sharded[2], 0.0, 2 * sharded[1] * here + 2 * (1 - here) * sharded[1], 12 * sharded[0] * here)
    if args.fsdp:
        offload = bool((args.fsdp_config or {}).get("cpu_offload"))
        kept = 0.0 if (args.fsdp_config or {}).get("reshard_after_forward", True) else 2.0
        return Engine(0.0 if offload else 4 / ranks, kept, 0.0 if offload else 4 / ranks, 0.0 if offload else 8 / ranks)
    buckets = 4.0 if ranks > 1 else 0.0  # DDP reduces gradients in buffers of its own
    return Engine(0.0, 2.0 if half else 0.0, 4.0 + buckets, 8.0)


def choose(
    model: PreTrainedModel,
    args: Any,
    largest_step: int,
    prepare: Callable[[PreTrainedModel], None],
    trial: Callable[[PreTrainedModel, int], None],
    dtype: torch.dtype,
) -> Budget:
    """The budget that --tokens_per_micro_batch asks for. Every rank gets the smallest rank's answer.

    Under `auto` activations are measured, with forward and backward passes of one layer and of two on two numbers of tokens; gradients
    and optimizer state, which do not exist yet, are counted. The answer is never below the padded run's micro-batch, which must fit anyway.

    Args:
        args: the run's TrainingArguments.
        largest_step: tokens of one rank in the fullest step.
        prepare: makes a model compute as the real one does (compiled layers).
        trial: (model, tokens) -> runs forward and backward on one packed row, as training will.
        dtype: the compute type.
    """
    if args.tokens_per_micro_batch != "auto":
        return Budget(int(args.tokens_per_micro_batch), "--tokens_per_micro_batch")
    device, floor = args.device, args.per_device_train_batch_size * args.model_max_length
    if device.type != "cuda" or model.config._attn_implementation in ("sdpa", "eager"):
        return Budget(floor, "per device x --model_max_length")
    ceiling = min(largest_step, LARGEST)
    if ceiling <= floor:
        return Budget(floor, "per device x --model_max_length, more than any step has")
    half = dtype != torch.float32
    holds = engine(args, half)
    parameters = sum(weight.numel() or getattr(weight, "ds_numel", 0) for weight in model.parameters())
    trained = sum(
        weight.numel() or getattr(weight, "ds_numel", 0) for weight in model.parameters() if weight.requires_grad
    )
    fixed, per_layer = activation_bytes(model, args, prepare, trial)
    if per_layer <= 0:
        return Budget(floor, "per device x --model_max_length; the model's activations could not be measured")
    per_token = fixed + per_layer * model.config.num_hidden_layers
    free, card = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    to_come = (holds.weights + holds.compute_copy) * parameters + (holds.gradients + holds.optimizer) * trained
    head = (
        12 * model.config.vocab_size * model.config.hidden_size + 2 * GIB
    )  # its float32 gradient, scaled, cast; a chunk of logits
    room = max(0, int((free - SPARE * card - to_come - head) / per_token))
    if args.world_size > 1:
        smallest = torch.tensor(room, device=device)
        torch.distributed.all_reduce(smallest, torch.distributed.ReduceOp.MIN)
        room = int(smallest)
    measured = f"{per_token / 2**20:.2f} MiB per token, room for {room:,}"
    if room >= ceiling:
        return Budget(ceiling, f"auto: a whole step; {measured}")
    return Budget(max(floor, room), f"auto: {measured}")


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
    zero3 = args.hf_deepspeed_config if args.deepspeed else None
    if zero3 is not None:  # its model would be split over the ranks as it is made
        transformers.integrations.deepspeed.unset_hf_deepspeed_config()
    try:
        with torch.device(args.device):
            probe = AutoModelForCausalLM.from_config(
                small, attn_implementation=config._attn_implementation, dtype=torch.float32
            )
    finally:
        if zero3 is not None:
            transformers.integrations.deepspeed.set_hf_deepspeed_config(zero3)

    prepare(probe)
    if model.is_gradient_checkpointing:
        probe.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)

    def use_layers(count: int) -> None:
        probe.config.num_hidden_layers = count

    yield probe, use_layers

"""Measure how many tokens one micro-batch may hold on a GPU (`--tokens_per_micro_batch auto`)."""

import contextlib
import io
import math
from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from sft.arithmetic import compute_dtype
from sft.flags import ModelArguments, TrainingArguments
from sft.job import Choice
from sft.model import loading, lora
from sft.plan.memory import Plan
from sft.plan.model_sizes import with_layers
from sft.step.loss import summed_loss
from sft.step.packed_rows import PackedCollator

PROBES = (4_096, 8_192)  # tokens; long enough that the loss already works on whole chunks


def measured_tokens(
    model_args: ModelArguments,
    args: TrainingArguments,
    config: PreTrainedConfig,
    attention: str,
    floor: int,
    ceiling: int,
    prepare: Callable[[PreTrainedModel], torch.nn.Module],
    memory_plan: Plan,
) -> Choice:
    """As many tokens as memory has room for, from `floor` up to `ceiling`. Every rank gets the smallest rank's answer.

    Activations are measured on a small model of the same shape. The rest, most of which does not exist yet, is counted by the
    memory plan. Both divide what is free and what this process has reserved, wherever the run's weights are already.

    Args:
        floor: the padded run's micro-batch, which must fit anyway.
        ceiling: tokens of one rank in the fullest step, or as many as are ever worth trying.
        prepare: makes a model compute as the run's will; returns its LossHead.
    """
    what, device, room, fixed, per_layer = "tokens per micro-batch", args.device, 0, 0.0, 0.0
    # the run draws the same numbers as without
    with torch.random.fork_rng([device] if device.type == "cuda" else []), contextlib.suppress(torch.OutOfMemoryError):
        probe = small_model(model_args, args, config, attention)
        fixed, per_layer = activation_bytes(probe, prepare(probe), args)
        del probe
    torch.cuda.empty_cache()
    per_token = fixed + per_layer * config.num_hidden_layers
    share = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    # below the ceiling a step takes several micro-batches: gradients lie next to the activations
    for tokens in (ceiling, ceiling - 1) if per_layer > 0 else ():
        if room < ceiling:
            room = max(0, int((share - memory_plan.not_for_activations(tokens)) / per_token))
    if args.world_size > 1:
        smallest = torch.tensor(room, device=device)
        torch.distributed.all_reduce(smallest, torch.distributed.ReduceOp.MIN)
        room = int(smallest)
    if room <= floor:
        return Choice(what, floor, "per device x --model_max_length; no room was found for more")
    whole = "a whole step; " if room >= ceiling else ""
    measured = f"auto: {whole}{per_token / 2**20:.2f} MiB per token, room for {room:,}"
    return Choice(what, min(room, ceiling), measured)


def activation_bytes(probe: PreTrainedModel, head: torch.nn.Module, args: TrainingArguments) -> tuple[float, float]:
    """Peak bytes per token of everything but the layers, and of one layer; from the slopes of four measured peaks."""
    slopes = []
    if args.gradient_checkpointing or (args.fsdp_config or {}).get("activation_checkpointing"):
        probe.gradient_checkpointing_enable(args.gradient_checkpointing_kwargs)
    for layers in (1, 2):
        probe.config.num_hidden_layers = layers  # transformers' models run `self.layers[: config.num_hidden_layers]`
        peaks = []
        # the first compiles, and creates workspaces, which later peaks then have in common
        for tokens in (PROBES[0], *PROBES):
            torch.cuda.synchronize(args.device)
            torch.cuda.reset_peak_memory_stats(args.device)
            run_once(probe, head, tokens, args)
            peaks.append(torch.cuda.max_memory_allocated(args.device))
        slopes.append((peaks[2] - peaks[1]) / (PROBES[1] - PROBES[0]))
    per_layer = slopes[1] - slopes[0]
    return max(slopes[0] - per_layer, 0.0), per_layer


def small_model(
    model_args: ModelArguments, args: TrainingArguments, config: PreTrainedConfig, attention: str
) -> PreTrainedModel:
    """Two layers of the run's model with random weights, whole on each rank, with the number types of the run's."""
    options = {"attn_implementation": attention, "trust_remote_code": model_args.trust_remote_code}
    options["dtype"] = compute_dtype(args) if model_args.use_lora else torch.float32
    with loading.whole_models(args), torch.device(args.device):
        probe = AutoModelForCausalLM.from_config(with_layers(config, 2), **options)
        if model_args.use_lora:
            with contextlib.redirect_stdout(io.StringIO()):  # what it prints is true of two layers alone
                probe = lora.add_adapters(probe, model_args, args)
    return probe.train()


def fullest_peak(
    model: PreTrainedModel, head: torch.nn.Module, tokens: int, times: int, others: float, args: TrainingArguments
) -> int:
    """Peak bytes on the GPU of such micro-batches, one after the other, next to so many bytes that do not exist yet.

    Args:
        times: 2 where gradients lie next to the activations of a second micro-batch.
        others: of the optimizer's state, in pieces as large as its tensors.
    """
    largest = max(weight.nbytes for weight in model.parameters())
    held = [torch.empty(largest, dtype=torch.uint8, device=args.device) for _ in range(math.ceil(others / largest))]
    torch.cuda.reset_peak_memory_stats(args.device)
    model.train()
    for _ in range(times):
        run_once(model, head, tokens, args, keep=True)
    model.zero_grad()
    del held
    return torch.cuda.max_memory_allocated(args.device)


def run_once(
    probe: PreTrainedModel, head: torch.nn.Module, tokens: int, args: TrainingArguments, keep: bool = False
) -> None:
    """Forward and backward on one packed row, under autocast as Accelerate will wrap the run's model; gradients go unless `keep`."""
    ids, dtype = torch.zeros(256, dtype=torch.int64), compute_dtype(args)
    batch = PackedCollator()([{"input_ids": ids, "labels": ids}] * math.ceil(tokens / 256))
    batch = {key: value.to(args.device) if torch.is_tensor(value) else value for key, value in batch.items()}
    with torch.autocast(args.device.type, dtype, enabled=dtype != torch.float32):
        loss = summed_loss(probe, head, batch)
    loss.backward()
    if not keep:
        probe.zero_grad(set_to_none=True)

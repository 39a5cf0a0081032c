"""Plan the memory of a run on each GPU and in the host, from the model's config and the flags alone.

    python llama_training.py --model_name_or_path openlm-research/open_llama_7b --bf16 True \\
        --fsdp "full_shard auto_wrap" --plan_only True --plan_gpu_gib 80 --plan_world_size 4

Nothing is loaded: the model is built without memory, its parameters and what one of its layers keeps for backward are
counted, and the bytes of each part of a run are added up. benchmarks/results/ compares the sums with measured peaks.
"""

import importlib.util
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import torch

from sft.job import world_size
from sft.plan.model_sizes import Shape, kept_by_a_layer

GIB = 2**30
# Shares of a GPU's memory
OUTSIDE = 0.8 * GIB  # driver, kernels and cuBLAS, which PyTorch's allocator does not see
FRAGMENTS = 0.04  # pieces of the allocator's cache that no tensor fits into
SPARE = 0.08  # what `auto` leaves free, for pieces that differ in size from step to step
# Host memory of one process without weights, measured on an H100 (benchmarks/results/2026-11-24-h100-ladder.md): 0.9 to 1.2 GiB
HOST_LIBRARIES = 1.2 * GIB
# What a layer keeps, relative to one that computes in 16 bits (counted on LLaMA's shapes from 1.1 B to 7 B)
COMPILED = 0.7  # norms, rotary embedding and SwiGLU are computed again
LORA = 1.09  # each addition keeps its input
WORK = 0.6  # relative to what it keeps: gradients of activations while its backward pass runs
LOSS_CHUNK = 2**27  # logits that exist at a time: sft/step/loss.py, CHUNK_BYTES / 4
LARGEST_BUDGET = 65_536  # tokens; tokens x feed-forward width stays within 32-bit indices
ZERO3_LIVE = 10**9  # parameters: DeepSpeed's stage3_max_live_parameters


class Setting:
    """What a run's flags say about memory.

    Args:
        flags: the fields of ModelArguments and of TrainingArguments, parsed or built.
        step_tokens: of the fullest optimizer step on one rank; None assumes that every example is as long as can be.
        compiled: the decoder layers will be compiled.
    """

    def __init__(self, flags: dict[str, Any], step_tokens: int | None = None, compiled: bool = False):
        given = SimpleNamespace(**flags)
        self.flags, self.given_step_tokens = flags, step_tokens
        self.compiled = compiled or bool(given.compile_layers)
        file = _deepspeed_file(given.deepspeed)
        zero, fsdp = file.get("zero_optimization", {}), (given.fsdp_config or {}) if given.fsdp else {}
        self.cuda = given.plan_gpu_gib is not None or (torch.cuda.is_available() and not given.use_cpu)
        self.ranks = given.plan_world_size or world_size()
        self.ranks_here = min(self.ranks, 8 if given.plan_world_size else int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        # what the padded run's micro-batch may hold
        self.floor_tokens = given.per_device_train_batch_size * given.model_max_length
        self.longest, self.packing = given.model_max_length, given.packing
        self.step_tokens = step_tokens or self.floor_tokens * given.gradient_accumulation_steps
        self.tokens_asked = given.tokens_per_micro_batch
        self.compute = torch.bfloat16 if given.bf16 else torch.float16 if given.fp16 else torch.float32
        self.half = self.compute.itemsize == 2
        self.optimizer = getattr(given.optim, "value", given.optim)
        self.checkpointing = bool(given.gradient_checkpointing or fsdp.get("activation_checkpointing"))
        # Liger computes the losses where layers are not compiled
        self.liger = self.cuda and importlib.util.find_spec("liger_kernel") is not None and not self.compiled
        self.stage = zero.get("stage", 0)
        self.engine = "zero" if self.stage else "fsdp" if given.fsdp and self.cuda else "ddp"  # ddp is one rank too
        devices = [(zero.get(f"offload_{part}") or {}).get("device", "none") for part in ("optimizer", "param")]
        self.offload_optimizer = devices[0] != "none" or bool(fsdp.get("cpu_offload"))
        self.offload_weights = (self.stage == 3 and devices[1] != "none") or bool(fsdp.get("cpu_offload"))
        # ZeRO adds 16-bit gradients up in float32
        self.float32_sums = self.half and file.get("data_types", {}).get("grad_accum_dtype") == "fp32"
        bucket = zero.get("reduce_bucket_size", 5e8)  # gradients that ZeRO reduces at a time
        self.bucket = None if bucket == "auto" else float(bucket)
        # rank 0 alone reads the weights, and the others get their shards from it
        self.read_once = self.stage == 3 or bool(
            self.engine == "fsdp" and fsdp.get("version", 2) == 2 and fsdp.get("cpu_ram_efficient_loading")
        )
        self.lora_rank = (given.lora_r or 16) if given.use_lora else 0
        self.lora_dropout = given.lora_dropout is None or given.lora_dropout > 0
        self.four_bit = given.load_in_4bit

    def changed(self, **flags: Any) -> "Setting":
        return Setting({**self.flags, **flags}, self.given_step_tokens, self.compiled)


def _deepspeed_file(deepspeed: Any) -> dict:
    if isinstance(deepspeed, str):
        return json.loads(Path(deepspeed).read_text(encoding="utf-8-sig"))
    return deepspeed or {}


@dataclass(frozen=True)
class Plan:
    """Bytes of each part at the peak, on one GPU and in one machine's host memory, and what there is."""

    shape: Shape
    setting: Setting
    tokens: int  # of the largest micro-batch
    several: bool  # micro-batches in a step: gradients lie next to the activations
    token_bytes: float  # what one more token in a micro-batch costs
    not_activations: float  # what else the GPU holds at the end of a forward pass
    gpu: dict[str, float]  # parts that exist together at the peak
    host: dict[str, float]
    gpu_there: float
    host_there: float

    @property
    def gpu_peak(self) -> float:
        return sum(self.gpu.values())

    @property
    def host_peak(self) -> float:
        return sum(self.host.values())

    @property
    def gpu_usable(self) -> float:
        return self.gpu_there * (1 - FRAGMENTS) - OUTSIDE if self.setting.cuda else 0.0

    @property
    def fits(self) -> bool:
        return self.gpu_peak <= self.gpu_usable and self.host_peak <= self.host_there

    def at(self, tokens: int, micro_batches: int) -> "Plan":
        """The plan of the same run for micro-batches of so many tokens, and so many in a step."""
        return add_up(self.shape, self.setting, tokens, micro_batches > 1, self.gpu_there, self.host_there)

    def not_for_activations(self, tokens: int) -> float:
        """Bytes of PyTorch's share of the GPU that activations cannot have when a micro-batch holds so many tokens."""
        return self.at(tokens, 1 + (self.setting.step_tokens > tokens)).not_activations + SPARE * self.gpu_there

    def record(self) -> dict[str, Any]:
        """The plan for run_report.json, GiB."""
        return {
            "tokens_per_micro_batch": self.tokens,
            "gpu_peak_gib": self.gpu_peak / GIB,
            "host_peak_gib": self.host_peak / GIB,
            "gpu_gib": {part: size / GIB for part, size in self.gpu.items()},
            "host_gib": {part: size / GIB for part, size in self.host.items()},
            "fits": self.fits,
        }

    def table(self) -> list[str]:
        """The lines above the verdict."""
        s, size = self.setting, self.shape.parameters / 1e9
        how = {"ddp": "each holds the whole model" if s.ranks > 1 else "which holds the whole model", "fsdp": "FSDP"}
        engine = how.get(s.engine, f"ZeRO stage {s.stage}") + (", offloaded to the host" if s.offload_optimizer else "")
        processes = f"{s.ranks} process{'es' * (s.ranks > 1)} on the CPU"
        gpu = f"{s.ranks} x {self.gpu_there / GIB:.1f} GiB GPU" if s.cuda else processes
        batches = "several in a step" if self.several else "a whole step in one"
        lines = [
            f"memory plan: {size:.{2 if size >= 0.1 else 4}f} B parameters, {gpu}, {engine}",
            f"  micro-batches of up to {self.tokens:,} tokens ({batches}), {self.token_bytes / 2**20:.2f} MiB for each token",
        ]
        if s.cuda:
            lines.append(f"  GPU  {_parts(self.gpu, self.gpu_usable)}")
        return [*lines, f"  host {_parts(self.host, self.host_there)}"]


def _parts(parts: dict[str, float], usable: float) -> str:
    total = sum(parts.values())
    shown = ", ".join(f"{part} {size / GIB:.1f}" for part, size in parts.items() if size >= 0.05 * GIB)
    there = f" of {usable / GIB:.1f} GiB usable" if math.isfinite(usable) else " GiB for each machine"
    return f"{total / GIB:.1f}{there}: {shown}"


def make(shape: Shape, setting: Setting, gpu_there: float, host_there: float) -> Plan:
    """Add up a run, at the number of tokens that its micro-batches will have.

    `auto` grows from the padded run's number as far as the GPU has room; an explicit number is used unchanged.
    """

    def at_most(tokens: int) -> Plan:
        step = setting.step_tokens  # packing makes as few micro-batches as fit, of nearly one size
        several = step > tokens
        if setting.packing:
            tokens = math.ceil(step / math.ceil(step / tokens))
        return add_up(shape, setting, tokens, several, gpu_there, host_there)

    if not setting.packing:
        return at_most(setting.floor_tokens)
    least = min(setting.floor_tokens, setting.step_tokens)
    if setting.tokens_asked is not None or not setting.cuda:
        return at_most(setting.tokens_asked or least)
    limit, most = gpu_there * (1 - SPARE) - OUTSIDE, max(least, min(setting.step_tokens, LARGEST_BUDGET))
    whole = at_most(most)  # may fit where fewer do not: one micro-batch in a step needs no gradients next to it
    if whole.gpu_peak <= limit:
        return whole
    fitting, too_many = least, most
    while too_many - fitting > 1:  # bisection
        tokens = (fitting + too_many) // 2
        fitting, too_many = (tokens, too_many) if at_most(tokens).gpu_peak <= limit else (fitting, tokens)
    return at_most(fitting)


def activation_bytes(shape: Shape, s: Setting) -> tuple[float, float]:
    """Bytes that one token leaves for backward in one decoder layer, and in one that is recomputed: its input."""
    autocast = s.half and s.engine == "ddp" and not (s.lora_rank or s.compiled)
    kept = kept_by_a_layer(shape, s.half, autocast, not s.packing)
    if s.lora_rank:  # and dropout's masks, one byte for each input
        kept = LORA * kept + s.lora_dropout * shape.adapter_inputs / shape.layers
    elif s.compiled and s.half:
        kept *= COMPILED
    wide = not s.half or (autocast and not s.packing)  # autocast alone leaves the residual stream in float32
    return kept, (4 if wide else 2) * shape.hidden


def add_up(shape: Shape, s: Setting, tokens: int, several: bool, gpu_there: float, host_there: float) -> Plan:
    """The parts at the peak. It lies at the end of a forward pass (all activations, the loss's chunk of logits) or at the
    end of a backward pass (all gradients); the larger is taken. On the CPU all of it lies in host memory.
    """
    trained = shape.adapters * s.lora_rank if s.lora_rank else shape.parameters
    frozen = shape.parameters if s.lora_rank else 0
    compute, full_copies = s.compute.itemsize, s.half and s.engine == "ddp" and not s.lora_rank
    head_weights = shape.vocabulary * shape.hidden
    layer = (shape.parameters - shape.embedding - shape.head) / shape.layers
    sharded = s.ranks if s.engine != "ddp" else 1

    # Weights: float32 where they are trained; under ZeRO in the compute type, with a float32 copy next to the optimizer.
    frozen_bytes, gathered = float(compute * frozen), 0.0
    if s.four_bit:  # nf4 in blocks of 64 with a scale of 8 bits each, and one of 32 for 256 of these
        frozen_bytes = (0.5 + 1 / 64 + 4 / (64 * 256)) * shape.linear + compute * (frozen - shape.linear)
        gathered = compute * shape.largest_linear  # unpacked
    weights = (frozen_bytes + 4 * trained) / sharded
    if s.engine == "zero":
        weights = (frozen_bytes + compute * trained) / (s.ranks if s.stage == 3 else 1)
    # Autocast keeps a copy of each linear weight in the compute type until its layer's backward pass, or with recomputation until
    # the forward pass ends.
    copies, cast = (compute * shape.linear, compute * head_weights) if full_copies else (0, 0)
    if s.engine == "fsdp":  # the layer at work and the next one, each with the buffer it arrives in
        gathered += compute * (4 * layer + head_weights)
    if s.stage == 3:
        gathered += compute * min(shape.parameters, ZERO3_LIVE)

    # Gradients at the end of the forward pass and of the backward pass, and the buffers in which they are reduced.
    after, buffers = 4 * trained / sharded, 0.0
    before = after if several else 0.0
    if s.engine == "ddp" and s.ranks > 1:
        buffers = 4 * trained
    elif s.engine == "fsdp":
        before = compute * trained if several else 0.0  # kept whole, in the compute type, until the last micro-batch
        buffers = 4 * compute * layer * (not s.lora_rank)
    elif s.stage == 3:
        buffers = 4 * compute * max(shape.hidden**2, head_weights) * (not s.lora_rank)
        before = after = 0.0 if s.offload_optimizer else after  # one tensor, made at the start
    elif s.stage == 1:
        after = (4 if s.float32_sums else compute) * trained
        before = after if several else 0.0
    elif s.stage == 2 and s.offload_optimizer and not s.float32_sums:
        before = after = 0.0
    if s.stage in (1, 2) and not s.lora_rank:
        # deepspeed 0.19.8, stage_1_and_2.py: two buckets are filled, and joined for their reduction. A gradient larger
        # than the bucket stays by itself until the backward pass is over.
        bucket = shape.hidden**2 if s.bucket is None else s.bucket  # transformers 5.23, integrations/deepspeed.py
        after += 3 * compute * bucket
        if several or not s.offload_optimizer:
            after += compute * sum(size for size in shape.tensors if size > bucket) / s.ranks
    optimizer = optimizer_bytes(s.optimizer, trained, 0 if s.lora_rank else shape.embedding) / sharded
    optimizer += 4 * trained / s.ranks * (s.engine == "zero" and s.half)

    kept, recomputed = activation_bytes(shape, s)
    work = WORK * kept / (COMPILED if s.compiled else 1)
    ends = 8 * compute * shape.hidden  # embedding, final norm, the trained positions and their gradient
    token_bytes = ends + (shape.layers * recomputed + kept if s.checkpointing else shape.layers * kept)

    # Head: its gradient (taken in forward, scaled in backward), its cast; the chunk of logits is gone when backward begins.
    head_gradient = 0 if s.lora_rank else 4 * head_weights
    per_logit = (compute if s.liger else 6 if s.compiled else 19) if s.packing else 16  # Liger writes over the logits
    logits = tokens * shape.vocabulary
    chunk = per_logit * (min(logits, LOSS_CHUNK) if s.packing else logits)
    head = max(head_gradient + cast + chunk, 2 * head_gradient + work * tokens)

    forward = before + buffers, token_bytes * tokens, head, copies + gathered
    backward = after + buffers, (kept + work) * tokens, head_gradient, gathered
    peak = forward if s.offload_optimizer and s.engine == "fsdp" else max(forward, backward, key=sum)
    state = 0.0 if s.offload_weights else weights, 0.0 if s.offload_optimizer else optimizer
    names = "weights", "gradients", "optimizer", "activations", "head and loss", "copies and gathers"
    gpu = dict(zip(names, (state[0], peak[0], state[1], *peak[1:])))
    others = sum(state) + before + buffers + head + copies + gathered
    joined = compute * trained
    if s.stage in (1, 2) and sum(gpu.values()) < weights + joined:
        # deepspeed 0.19.8, stage_1_and_2.py, joins the trained weights into one tensor: at the start both are there
        gpu = dict.fromkeys(gpu, 0.0) | {"weights": weights, "copies and gathers": joined}
    if s.cuda:
        host = host_bytes(shape, s, trained)
    else:
        host = {"libraries": 0.7 * GIB * s.ranks_here} | {part: size * s.ranks_here for part, size in gpu.items()}
        gpu = dict.fromkeys(gpu, 0.0)
    return Plan(shape, s, tokens, several, token_bytes, others, gpu, host, gpu_there, host_there)


def host_bytes(shape: Shape, s: Setting, trained: float) -> dict[str, float]:
    """The parts in one machine's memory: the model passes through it when it loads and when it is saved."""
    compute, libraries = s.compute.itemsize, {"libraries": HOST_LIBRARIES * s.ranks_here}
    if s.four_bit:  # packed on the GPU, tensor by tensor, by every rank
        return libraries | {"loading or saving": 2 * compute * shape.largest_linear * s.ranks_here}
    # what is loaded in the type of the file stays memory-mapped (transformers 5.23), and the kernel may drop it
    loads = s.compute if s.lora_rank else torch.float32
    loading = shape.parameters * (0 if loads == shape.config.dtype else loads.itemsize)
    loading *= 1 if s.read_once else s.ranks_here
    saving = 0 if s.lora_rank else compute * shape.parameters
    saving += 4 * trained * (s.engine == "fsdp")  # gathered in float32 on rank 0, then cast
    if not s.offload_optimizer:
        return libraries | {"loading or saving": max(loading, saving)}
    share = trained / s.ranks
    parts = {"optimizer": optimizer_bytes(s.optimizer, share, 0), "weights": 4 * share, "gradients": 4 * share}
    if s.engine == "fsdp":
        parts["weights"] += compute * shape.parameters / s.ranks * (s.lora_rank > 0)
    else:
        # deepspeed 0.19.8, stage_1_and_2.py: float32 weights, their 16-bit copy on its way back to the GPU and float32
        # gradients are page-locked, and PyTorch rounds such a block up to a power of two
        parts["weights"] = _locked(4 * share) + _locked(compute * share) * (2 if s.offload_weights else 1)
        parts["gradients"] = _locked(4 * share)
        if s.stage == 3 or not s.float32_sums:  # stage3.py, grad_partitions_flat_buffer
            parts["gradients"] += _locked((4 if s.float32_sums else compute) * share)
    parts = {part: size * s.ranks_here for part, size in parts.items()}
    if sum(parts.values()) + saving < loading:
        return libraries | {"loading or saving": loading}
    return libraries | parts | {"loading or saving": saving}


def _locked(size: float) -> float:
    return float(1 << (max(1, int(size)) - 1).bit_length())


def optimizer_bytes(name: str, trained: float, embedding: float) -> float:
    """Bytes of optimizer state, by `--optim`.

    Args:
        embedding: trained weights of the input embedding, for which the Trainer keeps bitsandbytes at 32 bits (5.23, trainer.py).
    """
    blocks = 8 / 256  # two float32 scales for each block of 256
    if "bnb_8bit" in name or name in ("adamw_8bit", "paged_adamw_8bit"):
        return (2 + blocks) * (trained - embedding) + 8 * embedding
    small = {"adafactor": 0.01, "sgd": 0.0, "lion": 4.0}  # Adafactor: a row and a column of each matrix
    each = next((size for word, size in small.items() if word in name), 8.0)
    return trained * (2 + blocks if "8bit" in name else 1 + 2 * blocks if "4bit" in name else each)


def host_memory() -> float:
    """Bytes that the processes of this machine may have: its memory, or less in a container."""
    limit = Path("/sys/fs/cgroup/memory.max")
    contained = limit.read_text().strip() if limit.is_file() else "max"
    whole = psutil.virtual_memory().total
    return min(whole, int(contained)) if contained.isdigit() else whole

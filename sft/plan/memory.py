"""Plan the memory of a run on each GPU and in the host, from the model's config and the flags alone.

    python llama_training.py --model_name_or_path openlm-research/open_llama_7b --bf16 True \\
        --fsdp "full_shard auto_wrap" --plan_only True --plan_gpu_gib 80 --plan_world_size 4

Nothing is loaded: the bytes of each part of a run are added up. benchmarks/results/ compares the sums with measured peaks.
"""

import importlib.util
import math
import os
from bisect import bisect
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import torch

from sft.job import world_size
from sft.plan.deepspeed_file import read
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
# norms and SwiGLU keep their inputs alone; of what autocast keeps, measured: 1.24 of 2.12 MiB at 1.1 B, 3.86 of 6.50 at 7 B (benchmarks/LOG.md)
LIGERS = 0.6
LORA = 1.09  # each addition keeps its input
WORK = 0.6  # relative to what it keeps: gradients of activations while its backward pass runs
LOSS_CHUNK = 2**27  # logits that exist at a time: sft/step/loss.py, CHUNK_BYTES / 4
LARGEST_BUDGET = 65_536  # tokens; tokens x feed-forward width stays within 32-bit indices
ZERO3_LIVE = 10**9  # parameters: DeepSpeed's stage3_max_live_parameters


class Setting(SimpleNamespace):
    """What a run's flags say about memory, next to the flags themselves.

    Args:
        flags: the fields of ModelArguments and of TrainingArguments, parsed or built.
        step_tokens: of the fullest optimizer step on one rank; None assumes that every example is as long as can be.
        compiled: the decoder layers will be compiled.
    """

    def __init__(self, flags: dict[str, Any], step_tokens: int | None = None, compiled: bool = False):
        super().__init__(**flags)
        self.flags, self.compiled = flags, compiled or bool(self.compile_layers)
        file = read(self.deepspeed)[1] if self.deepspeed else {}
        zero, fsdp = file.get("zero_optimization") or {}, (self.fsdp_config or {}) if self.fsdp else {}
        self.cuda = self.plan_gpu_gib is not None or (torch.cuda.is_available() and not self.use_cpu)
        self.gpu_there = (self.plan_gpu_gib or 0) * GIB
        self.host_there = math.inf if self.plan_gpu_gib else host_memory()  # of another machine it is not known
        if self.cuda and not self.gpu_there:
            self.gpu_there = torch.cuda.get_device_properties(0).total_memory
        self.ranks = self.plan_world_size or world_size()
        self.ranks_here = min(self.ranks, 8 if self.plan_world_size else int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
        self.shards = self.ranks_here if fsdp.get("hybrid_shard") else self.ranks
        self.keeps_gathered = str(fsdp.get("reshard_after_forward", True)).lower() == "false"
        self.floor_tokens = self.per_device_train_batch_size * self.model_max_length  # the padded run's
        self.step_tokens = step_tokens or self.floor_tokens * self.gradient_accumulation_steps
        self.compute = torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else torch.float32
        self.half = self.compute.itemsize == 2
        self.optimizer = getattr(self.optim, "value", self.optim)
        self.recomputes = bool(self.gradient_checkpointing or fsdp.get("activation_checkpointing"))
        # Liger computes the losses where layers are not compiled
        self.liger = self.cuda and importlib.util.find_spec("liger_kernel") is not None and not self.compiled
        self.stage = zero.get("stage", 0)
        self.engine = "zero" if self.stage else "fsdp" if self.fsdp and self.cuda else "ddp"  # ddp is one rank too
        devices = [(zero.get(f"offload_{part}") or {}).get("device", "none") for part in ("optimizer", "param")]
        self.offload_optimizer = devices[0] != "none" or bool(fsdp.get("cpu_offload"))
        self.offload_weights = (self.stage == 3 and devices[1] != "none") or bool(fsdp.get("cpu_offload"))
        # ZeRO adds 16-bit gradients up in float32
        self.float32_sums = self.half and (file.get("data_types") or {}).get("grad_accum_dtype") == "fp32"
        self.bucket = zero.get("reduce_bucket_size", 5e8)  # gradients that ZeRO reduces at a time
        # rank 0 alone reads the weights, and the others get their shards from it
        from_rank_0 = fsdp.get("version", 2) == 2 and fsdp.get("cpu_ram_efficient_loading")
        self.read_once = self.stage == 3 or (self.engine == "fsdp" and from_rank_0)
        # a checkpoint in one piece is made on rank 0, in float32
        self.gathers = self.engine == "fsdp" and fsdp.get("state_dict_type") != "SHARDED_STATE_DICT"
        self.lora_rank = (self.lora_r or 16) if self.use_lora else 0
        self.masks = self.lora_dropout is None or self.lora_dropout > 0


@dataclass
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

    def __post_init__(self) -> None:
        s = self.setting
        self.gpu_usable = s.gpu_there * (1 - FRAGMENTS) - OUTSIDE if s.cuda else 0.0
        self.gpu_peak, self.host_peak = sum(self.gpu.values()), sum(self.host.values())
        self.has_spare_room = self.gpu_peak <= s.gpu_there * (1 - SPARE) - OUTSIDE
        self.fits = self.gpu_peak <= self.gpu_usable and self.host_peak <= s.host_there

    def at(self, tokens: int, micro_batches: int) -> "Plan":
        """The plan of the same run for micro-batches of so many tokens, and so many in a step."""
        return add_up(self.shape, self.setting, tokens, micro_batches > 1)

    def keeping_gathered(self) -> "Plan":
        """The plan of the same run with FSDP2's `reshard_after_forward` false."""
        config = (self.setting.fsdp_config or {}) | {"reshard_after_forward": False}
        setting = Setting(self.setting.flags | {"fsdp_config": config}, self.setting.step_tokens, self.setting.compiled)
        return add_up(self.shape, setting, self.tokens, self.several)

    def not_for_activations(self, tokens: int) -> float:
        """Bytes of PyTorch's share of the GPU that activations cannot have when a micro-batch holds so many tokens."""
        return self.at(tokens, 1 + (self.setting.step_tokens > tokens)).not_activations + SPARE * self.setting.gpu_there

    def record(self) -> dict[str, Any]:
        """The plan for run_report.json, GiB."""
        gpu, host = ({part: size / GIB for part, size in parts.items()} for parts in (self.gpu, self.host))
        peaks = {"gpu_peak_gib": self.gpu_peak / GIB, "host_peak_gib": self.host_peak / GIB}
        return {"tokens_per_micro_batch": self.tokens, **peaks, "gpu_gib": gpu, "host_gib": host, "fits": self.fits}

    def table(self) -> list[str]:
        """The lines above the verdict."""
        s, size = self.setting, self.shape.parameters / 1e9
        whole = f"{'each' if s.ranks > 1 else 'which'} holds the whole model"
        engine = {"ddp": whole, "fsdp": "FSDP"}.get(s.engine, f"ZeRO stage {s.stage}")
        engine += ", offloaded to the host" * s.offload_optimizer
        processes = f"{s.ranks} process{'es' * (s.ranks > 1)} on the CPU"
        gpu = f"{s.ranks} x {s.gpu_there / GIB:.1f} GiB GPU" if s.cuda else processes
        batches = "several in a step" if self.several else "a whole step in one"
        each = f"{self.token_bytes / 2**20:.2f} MiB for each token"
        lines = [
            f"memory plan: {size:.{2 if size >= 0.1 else 4}f} B parameters, {gpu}, {engine}",
            f"  micro-batches of up to {self.tokens:,} tokens ({batches}), {each}",
            f"  GPU  {_parts(self.gpu, self.gpu_usable)}",
            f"  host {_parts(self.host, s.host_there)}",
        ]
        return lines if s.cuda else [*lines[:2], lines[3]]


def _parts(parts: dict[str, float], usable: float) -> str:
    shown = ", ".join(f"{part} {size / GIB:.1f}" for part, size in parts.items() if size >= 0.05 * GIB)
    there = f", {usable / GIB:.1f} usable" if math.isfinite(usable) else " for each machine"
    return f"needs {sum(parts.values()) / GIB:.1f} GiB{there}: {shown}"


def make(shape: Shape, s: Setting) -> Plan:
    """Add up a run, at the number of tokens that its micro-batches will have.

    `auto` grows from the padded run's number as far as the GPU has room; an explicit number is used unchanged.
    """

    def at_most(tokens: int) -> Plan:
        several = s.step_tokens > tokens
        if s.packing:  # as few micro-batches as fit, of nearly one size
            tokens = math.ceil(s.step_tokens / math.ceil(s.step_tokens / tokens))
        return add_up(shape, s, tokens, several)

    if not s.packing:
        return at_most(s.floor_tokens)
    least = min(s.floor_tokens, s.step_tokens)
    if s.tokens_per_micro_batch or not s.cuda:
        return at_most(s.tokens_per_micro_batch or least)
    limit, most = s.gpu_there * (1 - SPARE) - OUTSIDE, max(least, min(s.step_tokens, LARGEST_BUDGET))
    whole = at_most(most)  # may fit where fewer do not: one micro-batch in a step needs no gradients next to it
    if whole.gpu_peak <= limit:
        return whole
    tokens = range(least + 1, most)
    return at_most(least + bisect(tokens, limit, key=lambda tokens: at_most(tokens).gpu_peak))


def activation_bytes(shape: Shape, s: Setting) -> tuple[float, float, float]:
    """Bytes of one token: left for backward in one decoder layer, in one that is recomputed (its input), and of a backward pass at work."""
    autocast = s.half and s.engine == "ddp" and not (s.lora_rank or s.compiled)
    kept = kept_by_a_layer(shape, s.half, autocast, not s.packing)
    if s.lora_rank:  # and dropout's masks, one byte for each input
        kept = LORA * kept + s.masks * shape.adapter_inputs / shape.layers
    work = WORK * kept
    if s.compiled and s.half and not s.lora_rank:
        kept *= COMPILED
    elif s.liger and autocast and s.packing and s.ranks == 1 and shape.takes_liger:
        kept *= LIGERS
    wide = not s.half or (autocast and not s.packing)  # autocast alone leaves the residual stream in float32
    return kept, (4 if wide else 2) * shape.hidden, work


def add_up(shape: Shape, s: Setting, tokens: int, several: bool) -> Plan:
    """The parts at the peak: at the end of a forward pass (activations, a chunk of logits) or of a backward pass (gradients)."""
    compute, full = s.compute.itemsize, not s.lora_rank
    trained, frozen = (shape.parameters, 0) if full else (shape.adapters * s.lora_rank, shape.parameters)
    head_weights = shape.vocabulary * shape.hidden
    layer = (shape.parameters - shape.embedding - shape.head) / shape.layers
    sharded = s.shards if s.engine != "ddp" else 1

    # Weights: float32 where they are trained; under ZeRO in the compute type, with a float32 copy next to the optimizer.
    frozen_bytes, gathered = compute * frozen, 0.0
    if s.load_in_4bit:  # nf4 in blocks of 64 with a scale of 8 bits each, and one of 32 for 256 of these
        frozen_bytes = (0.5 + 1 / 64 + 4 / (64 * 256)) * shape.linear + compute * (frozen - shape.linear)
        gathered = compute * shape.largest_linear  # unpacked
    held = frozen_bytes + (compute if s.engine == "zero" else 4) * trained
    weights = held if s.stage in (1, 2) else held / sharded
    # Autocast keeps a copy of each linear weight until its layer's backward pass, or with recomputation until the forward pass ends.
    copied = compute * (s.half and s.engine == "ddp" and full)
    copies, cast = copied * (shape.linear + shape.experts), copied * head_weights
    if s.engine == "fsdp":  # the layer at work and the next one, each with the buffer it arrives in
        gathered += compute * (4 * layer + head_weights)
        # the others, each until its backward pass
        copies += compute * s.keeps_gathered * max(0, shape.parameters - 4 * layer - head_weights)
    if s.stage == 3:
        gathered += compute * min(shape.parameters, ZERO3_LIVE)

    # Gradients at the end of the backward pass and of the forward pass, and the buffers in which they are reduced.
    share, some = 4 * trained / sharded, (4 if s.float32_sums else compute) * trained
    of_zero_2 = share * (s.float32_sums or not s.offload_optimizer)
    of_zero_3 = share * (not s.offload_optimizer)
    after, before, buffers = {
        # DDP lays its buckets out anew in the second step, next to the first one's (two H200s, torch 2.11: benchmarks/LOG.md)
        "ddp": (share, share * several, 2 * 4 * trained * (s.ranks > 1)),
        # kept whole, in the compute type, until the last micro-batch
        "fsdp": (share, compute * trained * several, 4 * compute * layer * full),
        1: (some, some * several, 0),
        2: (of_zero_2, of_zero_2 * several, 0),
        # one tensor, made at the start
        3: (of_zero_3, of_zero_3, 4 * compute * max(shape.hidden**2, head_weights) * full),
    }[s.stage or s.engine]
    if s.stage in (1, 2) and full:
        # deepspeed 0.19.8, stage_1_and_2.py: two buckets are filled, and joined for their reduction. A gradient larger
        # than the bucket stays by itself until the backward pass is over.
        # auto: transformers 5.23, integrations/deepspeed.py
        bucket = shape.hidden**2 if s.bucket == "auto" else float(s.bucket)
        after += 3 * compute * bucket
        if several or not s.offload_optimizer:
            after += compute * sum(size for size in shape.tensors if size > bucket) / s.ranks
    optimizer = optimizer_bytes(s.optimizer, trained, shape.embedding * full) / sharded
    optimizer += 4 * trained / s.ranks * (s.engine == "zero" and s.half)

    kept, recomputed, work = activation_bytes(shape, s)
    ends = 8 * compute * shape.hidden  # embedding, final norm, the trained positions and their gradient
    token_bytes = ends + (shape.layers * recomputed + kept if s.recomputes else shape.layers * kept)

    # Head: its gradient (taken in forward, scaled in backward), its cast; the chunk of logits is gone when backward begins.
    head_gradient = 4 * head_weights * full
    per_logit = (compute if s.liger else 6 if s.compiled else 19) if s.packing else 16  # Liger writes over the logits
    logits = tokens * shape.vocabulary
    chunk = per_logit * (min(logits, LOSS_CHUNK) if s.packing else logits)
    head = max(head_gradient + cast + chunk, 2 * head_gradient + work * tokens)

    forward = before + buffers, token_bytes * tokens, head, copies + gathered
    backward = after + buffers, (kept + work) * tokens, head_gradient, gathered
    peak = forward if s.offload_optimizer and s.engine == "fsdp" else max(forward, backward, key=sum)
    state = weights * (not s.offload_weights), optimizer * (not s.offload_optimizer)
    parts = "weights", "optimizer", "gradients", "activations", "head and loss", "copies and gathers"
    gpu = dict(zip(parts, (*state, *peak)))
    others = sum(state) + before + buffers + head + copies + gathered
    joined = compute * trained
    if s.stage in (1, 2) and sum(gpu.values()) < weights + joined:
        # deepspeed 0.19.8, stage_1_and_2.py, joins the trained weights into one tensor: at the start both are there
        gpu = dict.fromkeys(gpu, 0.0) | {"weights": weights, "copies and gathers": joined}
    host = host_bytes(shape, s, trained)
    if not s.cuda:
        host = {"libraries": 0.7 * GIB * s.ranks_here} | {part: size * s.ranks_here for part, size in gpu.items()}
        gpu = dict.fromkeys(gpu, 0.0)
    return Plan(shape, s, tokens, several, token_bytes, others, gpu, host)


def host_bytes(shape: Shape, s: Setting, trained: float) -> dict[str, float]:
    """The parts in one machine's memory: the model passes through it when it loads and when it is saved."""
    compute, libraries = s.compute.itemsize, {"libraries": HOST_LIBRARIES * s.ranks_here}
    if s.load_in_4bit:  # packed on the GPU, tensor by tensor, by every rank
        return libraries | {"loading or saving": 2 * compute * shape.largest_linear * s.ranks_here}
    # what is loaded in the type of the file stays memory-mapped (transformers 5.23), and the kernel may drop it
    loads = s.compute if s.lora_rank else torch.float32
    loading = shape.parameters * (loads != shape.config.dtype) * loads.itemsize * (1 if s.read_once else s.ranks_here)
    saving = 0 if s.lora_rank else compute * shape.parameters
    saving += 4 * trained * s.gathers
    share, parts = trained / s.shards, {}
    if s.offload_optimizer:
        weights = gradients = 4 * share
        if s.engine == "fsdp":
            weights += compute * shape.parameters / s.shards * (s.lora_rank > 0)
        else:
            # deepspeed 0.19.8, stage_1_and_2.py: float32 weights, their 16-bit copy on its way back to the GPU and float32
            # gradients are page-locked, and PyTorch rounds such a block up to a power of two
            weights = _locked(4 * share) + _locked(compute * share) * (2 if s.offload_weights else 1)
            gradients = _locked(4 * share)
            if s.stage == 3 or not s.float32_sums:  # stage3.py, grad_partitions_flat_buffer
                gradients += _locked((4 if s.float32_sums else compute) * share)
        parts = {"optimizer": optimizer_bytes(s.optimizer, share, 0), "weights": weights, "gradients": gradients}
        parts = {part: size * s.ranks_here for part, size in parts.items()}
    if sum(parts.values()) + saving < loading:
        parts, saving = {}, loading
    return libraries | parts | {"loading or saving": saving}


def _locked(size: float) -> float:
    return float(1 << (max(1, int(size)) - 1).bit_length())


def optimizer_bytes(name: str, trained: float, embedding: float) -> float:
    """Bytes of optimizer state, by `--optim`; bitsandbytes stays at 32 bits for the trained `embedding` (5.23, trainer.py)."""
    blocks = 8 / 256  # two float32 scales for each block of 256
    if "8bit" in name and "torch" not in name:
        return (2 + blocks) * (trained - embedding) + 8 * embedding
    # Adafactor keeps a row and a column of each matrix
    sizes = {"8bit": 2 + blocks, "4bit": 1 + 2 * blocks, "adafactor": 0.01, "sgd": 0.0, "lion": 4.0}
    return trained * next((size for word, size in sizes.items() if word in name), 8.0)


def host_memory() -> float:
    """Bytes that the processes of this machine may have: its memory, or less in a container."""
    limit = Path("/sys/fs/cgroup/memory.max")
    contained = limit.read_text().strip() if limit.is_file() else "max"
    whole = psutil.virtual_memory().total
    return min(whole, int(contained)) if contained.isdigit() else whole

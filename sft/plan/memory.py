"""The memory plan: what a run will hold on each GPU and in the host, from the model's config and the flags alone.

    python llama_training.py --model_name_or_path openlm-research/open_llama_7b --bf16 True \\
        --fsdp "full_shard auto_wrap" --plan_only True --plan_gpu_gib 80 --plan_world_size 4

Nothing is loaded: the model is built on the meta device, its parameters are counted, and the bytes that each part of a run
costs are added up. How far the sums are from measured peaks stands in benchmarks/results/.
"""

import importlib.util
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig

from sft.job import world_size
from sft.step.weight_copies import keeps_casts

GIB = 2**30


OUTSIDE = 0.8 * GIB  # of the card: driver, kernels and cuBLAS, which PyTorch's allocator does not see


FRAGMENTS = 0.04  # of the card: pieces of the allocator's cache that no tensor fits into


SPARE = 0.08  # of the card: what `auto` leaves free, for pieces that differ in size from step to step


# Host memory of one process beside weights, measured on an H100 (benchmarks/results/2026-11-24-h100-ladder.md): 0.9 to 1.2 GiB
HOST_LIBRARIES = 1.2 * GIB


LOSS_CHUNK = 2**27  # logits that exist at a time: sft/step/loss.py, CHUNK_BYTES / 4


LARGEST_BUDGET = 65_536  # tokens of a micro-batch to which `auto` grows at most (sft/plan/micro_batch_tokens.py)


ZERO3_LIVE = 10**9  # parameters: DeepSpeed's stage3_max_live_parameters


@dataclass(frozen=True)
class Shape:
    """Sizes of a model: parameter counts, and the widths that decide its activations."""

    layers: int
    hidden: int
    intermediate: int
    head_dim: int
    query: int  # heads x head_dim
    key: int  # key heads x head_dim
    vocabulary: int
    parameters: int
    in_layers: int  # parameters of all decoder layers
    linear: int  # parameters of the linear layers in them
    embedding: int
    head: int  # 0 when the output layer shares the embedding's weights
    adapters: int  # parameters that LoRA adds at rank 1
    largest_linear: int
    tensors: tuple[int, ...]  # parameters of each
    stored: torch.dtype | None  # type of the checkpoint, as its config says

    @classmethod
    def of(cls, config: PreTrainedConfig, targets: list[str] | None = None) -> "Shape | None":
        """Build the model without memory and measure it; None for an architecture without LLaMA's names.

        Args:
            targets: --lora_target_modules; None or ["all-linear"] are all linear layers but the head.
        """
        names = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers")
        architecture = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
        if architecture is None or not all(isinstance(getattr(config, name, None), int) for name in names):
            return None
        # `from_config` would split it among the ranks under ZeRO-3 (transformers 5.23)
        with torch.device("meta"):
            model = architecture(config)
        parameters = dict(model.named_parameters())  # tied tensors count once
        embedding = model.get_input_embeddings().weight
        output = model.get_output_embeddings().weight
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        key_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        linear = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and m.weight is not output}
        if targets not in (None, ["all-linear"]):
            adapted = [m for n, m in linear.items() if n in targets or n.rsplit(".", 1)[-1] in targets]
        else:
            adapted = list(linear.values())
        whole = sum(p.numel() for p in parameters.values())
        head = 0 if output is embedding else output.numel()
        return cls(
            layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            head_dim=head_dim,
            query=config.num_attention_heads * head_dim,
            key=key_heads * head_dim,
            vocabulary=config.vocab_size,
            parameters=whole,
            in_layers=whole - embedding.numel() - head - config.hidden_size,
            linear=sum(m.weight.numel() for m in linear.values()),
            embedding=embedding.numel(),
            head=head,
            adapters=sum(m.in_features + m.out_features for m in adapted),
            largest_linear=max((m.weight.numel() for m in linear.values()), default=0),
            tensors=tuple(p.numel() for p in parameters.values()),
            stored=config.dtype,
        )


@dataclass(frozen=True)
class Setting:
    """What a run's flags say about memory."""

    ranks: int
    ranks_per_machine: int
    floor_tokens: int  # per device x --model_max_length: what the padded run's micro-batch may hold
    longest: int  # --model_max_length
    step_tokens: int  # of the fullest optimizer step, on one rank
    tokens_asked: int | None  # --tokens_per_micro_batch; None for auto
    packing: bool
    compute: torch.dtype
    optimizer: str
    checkpointing: bool = False
    keeps_casts: bool = False  # 16-bit copies of the weights outlive a micro-batch
    compiled: bool = False  # decoder layers go through torch.compile
    liger: bool = False  # Liger computes the losses where layers are not compiled
    varlen: bool = False  # attention by FlashAttention, which takes heads of a multiple of 8
    engine: str = "ddp"  # ddp (also one process alone), fsdp, zero
    stage: int = 0  # of ZeRO
    offload_optimizer: bool = False
    offload_weights: bool = False
    pinned: bool = False  # offloaded parts lie in page-locked memory
    float32_sums: bool = False  # ZeRO adds 16-bit gradients up in float32
    bucket: float | None = None  # gradients that ZeRO reduces at a time; None for the Trainer's own number
    overlap: bool = False  # of ZeRO's reductions with backward: it fills a second bucket meanwhile
    handed_out: bool = False  # under FSDP: rank 0 alone reads the weights, and the others get their shards from it
    lora_rank: int = 0
    lora_dropout: bool = False
    four_bit: bool = False
    cuda: bool = True

    @classmethod
    def of(cls, model_args: Any, flags: Any, step_tokens: int | None = None, compiled: bool = False) -> "Setting":
        """Read the flags.

        Args:
            model_args, flags: objects with the fields of ModelArguments and of TrainingArguments, parsed or built.
            step_tokens: of the fullest optimizer step on one rank; None assumes that every example is as long as can be.
            compiled: the decoder layers will be compiled.
        """
        ranks = flags.plan_world_size or world_size()
        deepspeed = _deepspeed_file(flags.deepspeed)
        zero = deepspeed.get("zero_optimization", {})
        fsdp = (flags.fsdp_config or {}) if flags.fsdp else {}
        compute = torch.bfloat16 if flags.bf16 else torch.float16 if flags.fp16 else torch.float32
        sums = deepspeed.get("data_types", {}).get("grad_accum_dtype")
        bucket = zero.get("reduce_bucket_size", 5e8)
        cuda = flags.plan_gpu_gib is not None or (torch.cuda.is_available() and not flags.use_cpu)
        stage = zero.get("stage", 0)
        optimizer, weights = (zero.get(key) or {} for key in ("offload_optimizer", "offload_param"))
        offload = bool(fsdp.get("cpu_offload"))
        floor = flags.per_device_train_batch_size * flags.model_max_length
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        return cls(
            ranks=ranks,
            ranks_per_machine=min(ranks, 8 if flags.plan_world_size else here),
            floor_tokens=floor,
            longest=flags.model_max_length,
            step_tokens=step_tokens or floor * flags.gradient_accumulation_steps,
            tokens_asked=None if flags.tokens_per_micro_batch == "auto" else int(flags.tokens_per_micro_batch),
            packing=flags.packing,
            compute=compute,
            optimizer=getattr(flags.optim, "value", flags.optim),
            checkpointing=bool(flags.gradient_checkpointing or fsdp.get("activation_checkpointing")),
            keeps_casts=keeps_casts(flags),
            compiled=compiled or flags.compile_layers == "True",
            liger=cuda and importlib.util.find_spec("liger_kernel") is not None,
            varlen=model_args.attn_implementation == "varlen",
            engine="zero" if stage else "fsdp" if flags.fsdp and cuda else "ddp",
            stage=stage,
            offload_optimizer=optimizer.get("device", "none") != "none" or offload,
            offload_weights=(stage == 3 and weights.get("device", "none") != "none") or offload,
            pinned=bool(optimizer.get("pin_memory")),
            float32_sums=compute != torch.float32 and sums in ("fp32", "float32", "float", "torch.float32"),
            bucket=None if bucket == "auto" else float(bucket),
            overlap=bool(zero.get("overlap_comm")),
            handed_out=bool(fsdp.get("version", 2) == 2 and fsdp.get("cpu_ram_efficient_loading")),
            lora_rank=(model_args.lora_r or 16) if model_args.use_lora else 0,
            lora_dropout=model_args.lora_dropout is None or model_args.lora_dropout > 0,
            four_bit=model_args.load_in_4bit,
            cuda=cuda,
        )

    @property
    def half(self) -> bool:
        return self.compute.itemsize == 2


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
    token_bytes: float  # what one more token in it costs
    beside: float  # what the GPU holds at the end of a forward pass beside activations
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

    def not_for_activations(self, tokens: int) -> float:
        """Bytes of PyTorch's share of the card that activations cannot have when a micro-batch holds so many tokens."""
        beside = _add_up(self.shape, self.setting, tokens, self.gpu_there, self.host_there).beside
        return beside + SPARE * self.gpu_there

    @property
    def fits(self) -> bool:
        return self.gpu_peak <= self.gpu_usable and self.host_peak <= self.host_there

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
        s = self.setting
        whole = "a whole step in one" if not accumulates(s, self.tokens) else "several in a step"
        how = {"ddp": "each holds the whole model" if s.ranks > 1 else "which holds the whole model", "fsdp": "FSDP"}
        engine = how.get(s.engine, f"ZeRO stage {s.stage}") + (", offloaded to the host" if s.offload_optimizer else "")
        processes = f"{s.ranks} process{'es' * (s.ranks > 1)} on the CPU"
        gpu = (f"{s.ranks} x {self.gpu_there / GIB:.1f} GiB GPU" if s.cuda else processes) + f", {engine}"
        size = self.shape.parameters / 1e9
        lines = [
            f"memory plan: {size:.{2 if size >= 0.1 else 4}f} B parameters, {gpu}",
            f"  micro-batches of up to {self.tokens:,} tokens ({whole}), {self.token_bytes / 2**20:.2f} MiB for each token",
        ]
        if s.cuda:
            lines.append(f"  GPU  {_parts(self.gpu, self.gpu_usable)}")
        return [*lines, f"  host {_parts(self.host, self.host_there)}"]


def _parts(parts: dict[str, float], usable: float) -> str:
    total = sum(parts.values())
    shown = ", ".join(f"{part} {size / GIB:.1f}" for part, size in parts.items() if size >= 0.05 * GIB)
    there = f" of {usable / GIB:.1f} GiB usable" if math.isfinite(usable) else " GiB for each machine"
    return f"{total / GIB:.1f}{there}: {shown}"


def accumulates(setting: Setting, tokens: int) -> bool:
    """Whether a step takes more than one micro-batch."""
    return setting.step_tokens > tokens


def activation_bytes(shape: Shape, setting: Setting) -> tuple[float, float]:
    """Bytes that one token leaves for backward in one decoder layer, and in one that is recomputed.

    tests/plan/test_memory.py counts them on the layers of transformers with `torch.autograd.graph.saved_tensors_hooks`:

        autocast, float32 weights   22 H + 8 I + 4 Q + 4 K   every cast of a norm's output is a copy of its own
        16-bit weights (FSDP, ZeRO) 16 H + 8 I + 4 Q + 4 K
        compiled                     8 H + 6 I + 4 Q + 4 K   norms, rotary embedding and SwiGLU are recomputed
        frozen 16-bit, with LoRA    18 H + 8 I + 6 Q + 4 K   no input is kept for a frozen weight, but one for each addition,
                                   + 5 H + 1 I + 1 Q         and its dropout's mask
        float32                     24 H + 16 I + 8 Q + 8 K
        padded                      + 4 Q - 4 K, twice that in float32: the mask has keys and values repeated for each head
                                    + 4 H under autocast, which leaves the residual stream in float32

    with H hidden, I intermediate, Q all heads, K key heads.
    """
    hidden, intermediate, query, key = shape.hidden, shape.intermediate, shape.query, shape.key
    wide = 2 if setting.half else 4
    if not setting.half:
        kept = 24 * hidden + 16 * intermediate + 8 * query + 8 * key
    elif setting.lora_rank:
        kept = 18 * hidden + 8 * intermediate + 6 * query + 4 * key
        kept += (5 * hidden + intermediate + query) * setting.lora_dropout
    elif setting.compiled:
        kept = 8 * hidden + 6 * intermediate + 4 * query + 4 * key
    else:
        kept = (22 if setting.engine == "ddp" else 16) * hidden + 8 * intermediate + 4 * query + 4 * key
    if not setting.packing:
        wide_stream = setting.half and setting.engine == "ddp" and not setting.lora_rank
        kept += 2 * wide * (query - key) + 4 * hidden * wide_stream
        return kept, (4 if wide_stream else wide) * hidden
    missing = -shape.head_dim % 8  # sft/step/attention.py pads such heads: copies of all four, and the unpadded output
    if missing and setting.varlen:
        return kept + (4 * query + 4 * key) * missing / shape.head_dim + 2 * query, wide * hidden
    return kept, wide * hidden


def make(shape: Shape, setting: Setting, gpu_there: float, host_there: float) -> Plan:
    """Add up a run, at the number of tokens that its micro-batches will have.

    `auto` grows from the padded run's number as far as the GPU has room; what is asked for is taken as it is.
    """
    if not setting.packing:
        return _add_up(shape, setting, setting.floor_tokens, gpu_there, host_there)

    def at_most(tokens: int) -> Plan:
        step = setting.step_tokens  # packing makes as few micro-batches as fit, of nearly one size
        return _add_up(shape, setting, math.ceil(step / math.ceil(step / tokens)), gpu_there, host_there)

    least = min(setting.floor_tokens, setting.step_tokens)
    if setting.tokens_asked is not None or not setting.cuda:
        return at_most(setting.tokens_asked or least)
    limit, most = gpu_there * (1 - SPARE) - OUTSIDE, max(least, min(setting.step_tokens, LARGEST_BUDGET))
    whole = at_most(most)
    if (
        whole.gpu_peak <= limit
    ):  # also where fewer would not fit: one micro-batch in a step needs no gradients beside it
        return whole
    fitting, too_many = least, most
    while too_many - fitting > 1:  # bisection
        tokens = (fitting + too_many) // 2
        fitting, too_many = (tokens, too_many) if at_most(tokens).gpu_peak <= limit else (fitting, tokens)
    return at_most(fitting)


def _add_up(shape: Shape, setting: Setting, tokens: int, gpu_there: float, host_there: float) -> Plan:
    """The parts at the peak. It lies at the end of a forward pass (all activations, the loss's chunk of logits) or at the end
    of a backward pass (all gradients); the larger is taken. On the CPU all of it lies in host memory.
    """
    s, ranks = setting, setting.ranks
    trained = shape.adapters * s.lora_rank if s.lora_rank else shape.parameters
    frozen = shape.parameters if s.lora_rank else 0
    compute = s.compute.itemsize
    many = accumulates(s, tokens)
    layer, head_weights = shape.in_layers / shape.layers, shape.vocabulary * shape.hidden
    sharded = ranks if s.engine != "ddp" else 1

    # Weights: float32 where they are trained; under ZeRO in the compute type, with a float32 copy beside the optimizer.
    if s.four_bit:  # nf4 in blocks of 64 with a scale of 8 bits each, and one of 32 for 256 of these
        frozen_bytes = (0.5 + 1 / 64 + 4 / (64 * 256)) * shape.linear + compute * (frozen - shape.linear)
        unpacked = compute * shape.largest_linear
    else:
        frozen_bytes, unpacked = compute * frozen, 0
    if s.engine == "zero":
        weights = (frozen_bytes + compute * trained) / (ranks if s.stage == 3 else 1)
    else:
        weights = (frozen_bytes + 4 * trained) / sharded
    # Each linear weight has a copy in the compute type. Some runs keep them (sft/step/weight_copies.py); autocast until their layer's backward pass,
    # or with recomputation until the forward pass ends.
    copies = compute * shape.linear if s.engine == "ddp" and s.half and not s.lora_rank else 0
    gathered: float = unpacked
    if s.engine == "fsdp" and ranks >= 1:  # the layer at work and the next one, each with the buffer it arrives in
        gathered += compute * (4 * layer + head_weights)
    if s.stage == 3:
        gathered += compute * min(shape.parameters, ZERO3_LIVE)

    # Gradients, at the end of the forward pass and of the backward pass.
    full, buckets, reducing = 4 * trained / sharded, 0.0, 0.0
    before, after = (full if many else 0.0), full
    if s.engine == "ddp" and ranks > 1:
        buckets = 4 * trained  # DDP reduces in buffers of its own
    elif s.engine == "fsdp":
        before = compute * trained if many else 0.0  # kept whole, in the compute type, until the last micro-batch
        buckets = 4 * compute * layer if not s.lora_rank else 0.0
    elif s.engine == "zero":
        if s.stage == 1:
            after = (4 if s.float32_sums else compute) * trained
            before = after if many else 0.0
        elif s.stage == 3:
            buckets = 4 * compute * max(shape.hidden**2, head_weights) if not s.lora_rank else 0.0
            before = after = 0.0 if s.offload_optimizer else full  # one tensor, made at the start
        elif s.offload_optimizer and not s.float32_sums:
            before = after = 0.0
        if s.stage < 3:
            reducing, buckets = _reduction(shape, s, many)
    optimizer = optimizer_bytes(s.optimizer, trained, 0 if s.lora_rank else shape.embedding) / sharded
    if s.engine == "zero" and s.half:
        optimizer += 4 * trained / ranks

    # Activations, and the gradients of one layer's while its backward pass runs.
    kept, recomputed = activation_bytes(shape, s)
    work = (6 * shape.intermediate + 12 * shape.hidden) * compute / 2
    ends = 8 * compute * shape.hidden  # embedding, final norm, the trained positions and their gradient
    per_token = shape.layers * (recomputed if s.checkpointing else kept) + ends + (kept if s.checkpointing else 0)
    activations = per_token * tokens

    # Head: its gradient (taken in forward, scaled in backward), its cast; the chunk of logits is gone when backward begins.
    trained_head = 0 if s.lora_rank else 4 * head_weights
    if s.packing and s.liger and not s.compiled:
        chunk = compute * min(tokens * shape.vocabulary, LOSS_CHUNK)  # its kernel writes the gradient over the logits
    elif s.packing:
        chunk = (6 if s.compiled else 19) * min(tokens * shape.vocabulary, LOSS_CHUNK)  # eager: 19 bytes for each logit
    else:
        chunk = 16 * tokens * shape.vocabulary
    cast = compute * head_weights if s.half and s.engine == "ddp" and not s.lora_rank else 0
    head = max(trained_head + cast + chunk, 2 * trained_head + cast * s.keeps_casts + work * tokens)

    gpu_forward = {"gradients": before, "activations": activations, "head and loss": head, "copies": copies}
    gpu_backward = {
        "gradients": after + reducing,
        "activations": (kept + work) * tokens,
        "head and loss": trained_head + cast * s.keeps_casts,
        "copies": copies * s.keeps_casts,
    }
    peak = max((gpu_forward, gpu_backward), key=lambda parts: sum(parts.values()))
    on_gpu_weights = 0.0 if s.offload_weights else weights
    if s.offload_optimizer and s.engine == "fsdp":
        peak = {**gpu_forward, "gradients": before}
    gpu = {
        "weights": on_gpu_weights,
        "gradients": peak["gradients"] + buckets,
        "optimizer": 0.0 if s.offload_optimizer else optimizer,
        "activations": peak["activations"],
        "head and loss": peak["head and loss"],
        "copies and gathers": peak["copies"] + gathered,
    }
    joined = compute * trained
    if s.engine == "zero" and s.stage < 3 and sum(gpu.values()) < weights + joined:
        # deepspeed 0.19.8, stage_1_and_2.py, joins the trained weights into one tensor: at the start both are there
        gpu = dict.fromkeys(gpu, 0.0) | {"weights": weights, "copies and gathers": joined}
    host = _host(shape, s, trained, many) if s.cuda else {"libraries": 0.7 * GIB * s.ranks_per_machine}
    if not s.cuda:
        host |= {part: size * s.ranks_per_machine for part, size in gpu.items()}
        gpu = dict.fromkeys(gpu, 0.0)
    beside = on_gpu_weights + before + buckets + gpu["optimizer"] + head + copies + gathered
    return Plan(shape, s, tokens, per_token, beside, gpu, host, gpu_there, host_there)


def _reduction(shape: Shape, s: Setting, many: bool) -> tuple[float, float]:
    """Bytes of ZeRO-1 and 2 on one GPU for reducing gradients, at the end of a backward pass and always.

    Read in deepspeed 0.19.8, stage_1_and_2.py, and counted on the CPU. A bucket is filled (`setup_buckets`; two with overlap_comm) and
    joined for its reduction. A gradient larger than the bucket stays by itself until the backward pass is over
    (`copy_grads_in_partition` drops it in the last micro-batch alone, and only when it is offloaded). To be added to a float32 sum, a
    gradient is cast; the largest, the embedding's, comes last.
    """
    if s.lora_rank:  # its matrices are small
        return 0.0, 0.0
    compute, largest = s.compute.itemsize, max(shape.tensors)
    bucket = shape.hidden**2 if s.bucket is None else s.bucket  # transformers 5.23, integrations/deepspeed.py
    reducing = compute * (2 + s.overlap) * bucket + 4 * largest * s.float32_sums
    if many or not s.offload_optimizer:
        reducing += compute * sum(size for size in shape.tensors if size > bucket) / s.ranks
    return reducing, compute * largest * s.offload_optimizer  # temp_grad_buffer_for_gpu_offload


def _host(shape: Shape, s: Setting, trained: float, many: bool) -> dict[str, float]:
    """The parts in one machine's memory: the model passes through it when it loads and when it is saved."""
    compute, ranks_here = s.compute.itemsize, s.ranks_per_machine
    loads = s.compute if s.lora_rank else torch.float32
    libraries = {"libraries": HOST_LIBRARIES * ranks_here}
    if s.four_bit:
        # packed on the GPU, tensor by tensor, by every rank
        return libraries | {"loading": 2 * compute * shape.largest_linear * ranks_here}
    read_once = s.stage == 3 or (s.engine == "fsdp" and s.handed_out)
    # what is loaded in the type of the file stays memory-mapped (transformers 5.23), and the kernel may drop it
    loading = 0.0 if loads == shape.stored else loads.itemsize * shape.parameters * (1 if read_once else ranks_here)
    saving = compute * shape.parameters if not s.lora_rank else 0.0
    if s.engine == "fsdp":
        saving += 4 * trained  # gathered in float32 on rank 0, then cast
    if not s.offload_optimizer:
        return libraries | {"loading or saving": max(loading, saving)}
    share = trained / s.ranks  # of one rank
    states = optimizer_bytes(s.optimizer, share, 0)
    if s.engine == "fsdp":
        frozen = compute * shape.parameters / s.ranks if s.lora_rank else 0.0
        parts = {"optimizer": states, "weights": 4 * share + frozen, "gradients": 4 * share}
    else:
        # deepspeed 0.19.8, stage_1_and_2.py: float32 weights, their 16-bit copy on its way back to the GPU and float32 gradients
        # are page-locked, and PyTorch rounds such a block up to a power of two
        lock = _power_of_two if s.pinned else float
        parts = {"optimizer": states, "weights": lock(4 * share) + lock(compute * share), "gradients": lock(4 * share)}
        if s.stage == 3:  # stage3.py, grad_partitions_flat_buffer
            parts["gradients"] += lock((4 if s.float32_sums else compute) * share)
        elif many and not s.float32_sums:
            parts["gradients"] += compute * share * (1.35 if s.pinned else 1)  # one block for each tensor
        if s.offload_weights:
            parts["weights"] += lock(compute * share)
    parts = {part: size * ranks_here for part, size in parts.items()}
    if sum(parts.values()) + saving < loading:
        return libraries | {"loading": loading}
    return libraries | parts | {"saving": saving}


def _power_of_two(size: float) -> float:
    return float(1 << (max(1, int(size)) - 1).bit_length())


def optimizer_bytes(name: str, trained: float, embedding: float) -> float:
    """Bytes of optimizer state, by `--optim`.

    Args:
        embedding: trained weights of the input embedding, for which the Trainer keeps bitsandbytes at 32 bits (5.23, trainer.py).
    """
    blocks = 8 / 256  # two float32 scales for each block of 256
    if "bnb_8bit" in name or name in ("adamw_8bit", "paged_adamw_8bit"):
        return (2 + blocks) * (trained - embedding) + 8 * embedding
    if "8bit" in name:
        return (2 + blocks) * trained
    if "4bit" in name:
        return (1 + 2 * blocks) * trained
    if name.startswith("adafactor"):
        return 0.01 * trained  # one row and one column of each matrix
    if name.startswith("sgd"):
        return 0.0
    return (4.0 if "lion" in name else 8.0) * trained


def host_memory() -> float:
    """Bytes that the processes of this machine may have: its memory, or less in a container."""
    limit = Path("/sys/fs/cgroup/memory.max")
    contained = limit.read_text().strip() if limit.is_file() else "max"
    whole = psutil.virtual_memory().total
    return min(whole, int(contained)) if contained.isdigit() else whole

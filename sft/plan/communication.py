"""What GPUs send each other in an optimizer step, and whether a micro-batch has enough work to hide it."""

import math

from sft.plan.memory import Plan

REACHED = 6e14  # FLOP/s of packed steps on an H100 or H200; a slower GPU hides more
NVLINK = 2.5e11  # bytes/s in and out of a GPU for a layer of 400 MB: two H200s, NCCL 2.28 (benchmarks/LOG.md)


def bytes_of_a_step(plan: Plan) -> dict[str, float]:
    """Bytes that each GPU sends in a step, inside its machine and between machines: {"weights": …, "gradients": …, "between machines": …}"""
    s, parameters = plan.setting, plan.shape.parameters
    trained = plan.shape.adapters * s.lora_rank if s.lora_rank else parameters
    compute, micro_batches = s.compute.itemsize, math.ceil(s.step_tokens / plan.tokens)

    def shared(ranks: int) -> float:
        return (ranks - 1) / ranks

    if s.engine == "ddp":
        return {"gradients": 2 * 4 * trained * shared(s.ranks)}
    if s.engine == "fsdp":
        gathered = (1 if s.keeps_gathered else 2) * micro_batches * compute * parameters * shared(s.shards)
        copies = s.ranks // s.shards
        between = 2 * compute * trained / s.shards * shared(copies)
        return {"weights": gathered, "gradients": compute * trained * shared(s.shards), "between machines": between}
    sums = (1 if s.stage == 1 else micro_batches) * compute * trained * shared(s.ranks)
    gathered = compute * (2 * micro_batches * parameters if s.stage == 3 else trained) * shared(s.ranks)
    return {"weights": gathered, "gradients": sums}


def lines(plan: Plan) -> list[str]:
    """The plan's line on it; none for one GPU, or on a CPU."""
    s, network = plan.setting, plan.setting.plan_network_gb_s
    if s.ranks == 1 or not s.cuda:
        return []
    sent = bytes_of_a_step(plan)
    told = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in sent.items() if size >= 5e7)
    line = f"  communication: each GPU sends {sum(sent.values()) / 1e9:.1f} GB in a step" + f" ({told})" * bool(told)
    sharded = s.shards if s.engine == "fsdp" else s.ranks  # ranks that send each other a part of every layer
    crosses = sharded > s.ranks_here
    between = sent.pop("between machines", 0.0)
    if (crosses or between) and network is None:
        return [f"{line}, some of it between machines: --plan_network_gb_s tells what that costs"]
    speed = network * 1e9 if network and crosses else NVLINK
    seconds = sum(sent.values()) / speed + (between / (network * 1e9) if network else 0)
    # a layer is gathered while the one before is computed; DDP sends gradients twice while a backward pass computes
    needed = (2 if s.engine == "ddp" else s.compute.itemsize / 2) * REACHED / speed * (sharded - 1) / sharded
    line += f", {1e3 * seconds:,.0f} ms at {speed / 1e9:,.4g} GB/s. "
    line += f"It hides behind {needed:,.0f} tokens in a micro-batch; this run's have up to {plan.tokens:,}"
    if plan.tokens >= needed:
        return [line]
    helps = ["a larger --per_device_train_batch_size"]
    helps += ["--keep_gathered_weights True"] * (s.engine == "fsdp" and not s.keeps_gathered)
    helps += ['--fsdp "hybrid_shard auto_wrap"'] * crosses
    return [f"{line}. What helps: {', '.join(helps)}"]

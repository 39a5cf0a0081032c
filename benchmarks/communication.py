"""Run a training script and say how long its GPU waited for other GPUs.

    torchrun --nproc_per_node=4 benchmarks/communication.py llama_training.py --model_name_or_path ...

The script runs as it would by itself. Two optimizer steps after the fourth are profiled, and rank 0 prints one line:
milliseconds per step, the share of them with a collective under way, and the share with nothing else under way, which
is what communication costs.
"""

import runpy
import sys
from pathlib import Path

import torch
import transformers

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sft.job import say
from sft.run.prepare import Run

FIRST, STEPS = 4, 2
COLLECTIVE = ("nccl", "gloo:")


def union(spans: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """[(0, 2), (1, 3), (5, 6)] -> [(0, 3), (5, 6)]"""
    joined: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((start, end))
    return joined


def length(spans: list[tuple[float, float]]) -> float:
    return sum(end - start for start, end in union(spans))


def shares(events: list[tuple[str, float, float]]) -> tuple[float, float, float]:
    """Of kernels (name, start, end): the time they span, the share with a collective, and with nothing but one.

    [("gemm", 0, 6), ("ncclAllGather", 4, 8), ("gemm", 8, 10)] -> (10, 0.4, 0.2)
    """
    spans = {
        kind: [(start, end) for name, start, end in events if name.startswith(COLLECTIVE) == (kind == "collective")]
        for kind in ("collective", "compute")
    }
    both = [*spans["collective"], *spans["compute"]]
    whole = max(end for _, end in both) - min(start for start, _ in both)
    return whole, length(spans["collective"]) / whole, (length(both) - length(spans["compute"])) / whole


class Profile(transformers.TrainerCallback):
    """Profiles some steps of this rank and prints the line."""

    def __init__(self):
        self.profiler = torch.profiler.profile(activities=list(torch.profiler.supported_activities()))

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == FIRST:
            self.profiler.start()
        if state.global_step == FIRST + STEPS:
            if args.device.type == "cuda":
                torch.cuda.synchronize()
            self.profiler.stop()
            kind = torch.autograd.DeviceType.CUDA if args.device.type == "cuda" else torch.autograd.DeviceType.CPU
            events = [
                (event.name, event.time_range.start, event.time_range.end)
                for event in self.profiler.events()
                # on a CPU an operator spans those it calls: its collectives and matrix products are enough
                if event.device_type == kind and (kind != torch.autograd.DeviceType.CPU or _leaf(event.name))
            ]
            whole, collective, exposed = shares(events)
            say(
                f"communication: {whole / STEPS / 1e3:.1f} ms per step, {collective:.1%} of it with a collective under "
                f"way, {exposed:.1%} with nothing else"
            )


def _leaf(name: str) -> bool:
    return name.startswith((*COLLECTIVE, "aten::mm", "aten::addmm", "aten::bmm"))


def main() -> None:
    script, sys.argv = sys.argv[1], sys.argv[1:]
    build = Run.build_trainer

    def build_and_profile(*arguments):
        trainer = build(*arguments)
        trainer.add_callback(Profile())
        return trainer

    Run.build_trainer = build_and_profile  # type: ignore[method-assign]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()

"""Count what ranks send each other in one optimizer step, by the name and the elements of each message, from PyTorch's profiler, which sees every engine's."""

import json
import math
import os
from collections import Counter

from torch.profiler import ProfilerActivity, profile
from transformers import TrainerCallback

from sft.run.trainer import SupervisedTrainer

PROFILED = 3  # the step: DDP divides its buckets anew in the second


class Count(TrainerCallback):
    def __init__(self, trainer: SupervisedTrainer):
        self.trainer = trainer

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step + 1 == PROFILED:
            self.profile = profile(activities=[ProfilerActivity.CPU], record_shapes=True)
            self.profile.start()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step != PROFILED:
            return
        self.profile.stop()
        sent: Counter[str] = Counter()
        for event in self.profile.events():
            if event.name.startswith("gloo:"):
                elements = sum(math.prod(shape) for shape in event.input_shapes[:1])
                sent[f"{event.name.removeprefix('gloo:')} {elements}"] += 1
        micro_batches = self.trainer.sampler.micro_batches
        sizes = [parameter.numel() for parameter in self.trainer.model.parameters()]
        print("COUNTED", json.dumps({"micro_batches": micro_batches, "sizes": sizes, "sent": sent}), flush=True)


def count_collectives() -> None:
    """`prepare` of a job: rank 0 prints a line that begins with COUNTED."""
    build = SupervisedTrainer.__init__

    def build_and_count(self, *args, **kwargs):
        build(self, *args, **kwargs)
        if os.environ["RANK"] == "0":
            self.add_callback(Count(self))

    SupervisedTrainer.__init__ = build_and_count


def shard_and_count() -> None:
    from fsdp_over_gloo import shard_on_a_cpu

    shard_on_a_cpu()
    count_collectives()

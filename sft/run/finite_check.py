"""Explain a loss that is not finite, and notice one that leaps: the step, the ranks and the rows of the data."""

import statistics
from collections import deque
from itertools import pairwise
from pathlib import Path

import torch
from transformers import TrainerCallback

from sft.job import gather, rank, say

SPIKE_MEMORY = 50  # logged losses that a new one is compared with


def explain_non_finite(trainer, micro_batches: list[tuple[dict, torch.Tensor]], grad_norm: float) -> str:
    """What is not finite, in which step, and the rows of the micro-batches that it came from. A collective.

    Args:
        micro_batches: inputs and loss of each micro-batch of this rank's step.
        grad_norm: of all ranks.
    """
    mine = [
        (rank(), number, loss.item(), rows_of(inputs, trainer.train_dataset))
        for number, (inputs, loss) in enumerate(micro_batches, start=1)
    ]
    every = [entry for entries in gather(mine) for entry in entries]
    guilty = [entry for entry in every if not torch.isfinite(torch.tensor(entry[2]))]
    step = trainer.state.global_step
    if guilty:
        what = f"the loss is {guilty[0][2]}"
    else:
        what = f"every loss is finite but the gradient norm is {grad_norm}; any of these micro-batches can be the cause"
    where = "\n".join(f"  rank {r}, micro-batch {n}: {', '.join(rows)}" for r, n, _, rows in guilty or every)
    return f"step {step + 1}: {what}\n{where}\nThe update was not applied: the weights are those of step {step}."


def what_to_try(output_dir: str, step: int, adapter: bool) -> str:
    """What is saved of a run that stopped before its next step, and what to do; a checkpoint is named only where there is one."""
    names = [folder.name.removeprefix("checkpoint-") for folder in Path(output_dir).glob("checkpoint-*")]
    newest = max((int(name) for name in names if name.isdecimal()), default=0)
    saved = f"They are in checkpoint-{step}" if newest == step else "They could not be saved (see above)"
    if 0 < newest < step:
        saved += f"; checkpoint-{newest} is the newest"
    begin = "that starts anew" + ", because an adapter's checkpoint cannot begin one" * bool(adapter and newest)
    if newest and not adapter:
        begin = f"that begins with saved weights (--model_name_or_path {output_dir}/checkpoint-{newest}) or starts anew"
    return (
        f"{saved if step else 'No step was taken yet'}.\n"
        f"What to try: read these rows; --bf16 True in place of --fp16; a lower --learning_rate or a longer --warmup_steps, in a run {begin}."
    )


def rows_of(inputs: dict, dataset) -> list[str]:
    """The rows of a micro-batch, found by its tokens (all rows with them, if several are equal).

    Args:
        inputs: a micro-batch of `PackedCollator`, or a padded one (`attention_mask`).
        dataset: with `lengths`, `where(i)` and `[i]["input_ids"]`.
    """
    ids = inputs["input_ids"].cpu()
    if inputs.get("attention_mask") is not None:
        examples = [row[mask.bool()] for row, mask in zip(ids, inputs["attention_mask"].cpu())]
    else:
        edges = inputs["cu_seq_lens_q"].tolist()
        parts = ids.flatten().split([end - start for start, end in pairwise(edges)])
        prefixes = ("prefix_starts", "prefix_lengths")
        starts, shared = (inputs[name].tolist() if name in inputs else [0] * len(parts) for name in prefixes)
        examples = [torch.cat([ids[0, a : a + n], part]) for a, n, part in zip(starts, shared, parts)]
    found = {
        index
        for example in examples
        for index in (dataset.lengths == len(example)).nonzero()[0].tolist()
        if torch.equal(dataset[index]["input_ids"], example)
    }
    return list(dict.fromkeys(map(dataset.where, sorted(found))))


class LossSpikes(TrainerCallback):
    """Prints a notice when a logged loss leaves the band of the ones before it."""

    def __init__(self):
        self.losses: deque[float] = deque(maxlen=SPIKE_MEMORY)

    def on_log(self, args, state, control, logs=None, **kwargs):
        loss = (logs or {}).get("loss")
        if loss is None:
            return
        if is_spike(loss, self.losses):
            before = f"the {len(self.losses)} before it had a median of {statistics.median(self.losses):.4f}"
            say(f"notice: step {state.global_step}: the loss is {loss:.4f}; {before}")
        self.losses.append(loss)


def is_spike(loss: float, before: deque[float] | list[float]) -> bool:
    """Whether a loss is above median + 6 times the median distance from it, and 20 % above the median.

    The median and not the mean, so that one spike does not widen the band for the next.
    """
    if len(before) < 10:
        return False
    middle = statistics.median(before)
    distance = statistics.median(abs(other - middle) for other in before)
    return loss > middle + 6 * distance and loss > 1.2 * middle

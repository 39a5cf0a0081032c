"""Fill micro-batches without changing the recipe: the sampler of packed (and padded) runs.

The padded run's permutation gives each optimizer step its examples. Here the examples of a step are distributed over as few
micro-batches as the token budget allows. The step's gradient is the padded run's up to rounding.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from torch.utils.data import Sampler

from sft.arithmetic import Arithmetic
from sft.job import UserError


def permutation(examples: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which the padded run visits its examples in one epoch.

    The stock Trainer hands a `RandomSampler` to Accelerate, which seeds it with `seed + epoch`
    (`SeedableRandomSampler` in accelerate 1.15, `data_loader.py`).
    """
    generator = torch.Generator().manual_seed(seed + epoch)
    return torch.randperm(examples, generator=generator).numpy()


def balance(lengths: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray]:
    """Share each step's examples out over bins: longest first, each into the bin that holds the fewest tokens.

    With at most `b * bins` examples of at most `L` tokens no bin exceeds `b * L`: a bin is chosen above `(b - 1) * L` only
    when every bin is, and then every bin holds `b` examples already. So the padded run's budget always fits.

    Args:
        lengths: (steps, examples per step), in tokens.
        bins: micro-batches of all ranks in one step.

    Returns:
        the bin of each example, (steps, examples per step), and the tokens in each bin, (steps, bins).

    Example:
        >>> balance(np.array([[5, 3, 3, 2]]), bins=2)
        (array([[0, 1, 1, 0]]), array([[7, 6]]))
    """
    steps, examples = lengths.shape
    rows = np.arange(steps)
    loads = np.zeros((steps, bins), dtype=np.int64)
    bin_of = np.zeros((steps, examples), dtype=np.int64)
    if bins == 1:
        return bin_of, lengths.sum(axis=1, dtype=np.int64)[:, None]
    longest_first = np.argsort(-lengths, axis=1, kind="stable")
    for column in longest_first.T:  # one example of every step at a time: numpy does all steps at once
        emptiest = loads.argmin(axis=1)
        bin_of[rows, column] = emptiest
        loads[rows, emptiest] += lengths[rows, column]
    return bin_of, loads


def fits(lengths: np.ndarray, bins: int, max_tokens: int) -> bool:
    """Whether `balance` keeps every bin of every step within the token budget."""
    sums = lengths.sum(axis=1, dtype=np.int64)
    if sums.max() > bins * max_tokens:
        return False
    # The last example into the fullest bin found it no fuller than the mean of the others.
    bound = (sums + (bins - 1) * lengths.max(axis=1, initial=0)) / bins
    doubtful = lengths[bound > max_tokens]
    return len(doubtful) == 0 or int(balance(doubtful, bins)[1].max()) <= max_tokens


class PackedBatchSampler(Sampler[list[int]]):
    """One rank's micro-batches, as lists of example indices; an empty list where a step has nothing left for this rank.

    With `padded` it gives the padded run's own micro-batches, and is used for it too: the stock chain of samplers repeats
    examples to fill an epoch's last step on several ranks, and forgets the epoch when it resumes there (accelerate 1.15).

    Args:
        lengths: tokens of each example.
        examples_per_step: the padded run's: per device x accumulation x ranks.
        max_tokens: the most tokens in one micro-batch; with `padded` it bounds nothing.
        seed: the padded run's `data_seed`, or its `seed`.
        epochs: how many epochs the number of micro-batches must fit.
        shuffle: False visits the examples in order, as evaluation does.
        drop_last: leave out the last step when it is not complete.
        padded: examples of one micro-batch, in the order of the permutation, instead of packing.

    Attributes:
        micro_batches: of each rank in each step, the smallest number that fits every step of every epoch.
        steps: optimizer steps in one epoch.

    Example:
        >>> list(PackedBatchSampler([5, 3, 3, 2, 4], 4, world_size=1, rank=0, max_tokens=7, seed=0, shuffle=False))
        [[0, 3], [1, 2], [4], []]
    """

    def __init__(
        self,
        lengths: Any,
        examples_per_step: int,
        world_size: int,
        rank: int,
        seed: int,
        max_tokens: int = 0,
        epochs: int = 1,
        shuffle: bool = True,
        drop_last: bool = False,
        padded: int | None = None,
    ):
        self.lengths = np.asarray(lengths, dtype=np.int64)
        self.examples_per_step = examples_per_step
        self.world_size, self.rank = world_size, rank
        self.max_tokens = max_tokens
        self.seed, self.epoch, self.epochs = seed, 0, epochs if shuffle else 1
        self.shuffle, self.drop_last, self.padded = shuffle, drop_last, padded
        whole, rest = divmod(len(self.lengths), examples_per_step)
        self.steps = whole + int(rest > 0 and not drop_last)
        if padded:
            self.micro_batches = -(-examples_per_step // (padded * world_size))
            return
        longest = int(self.lengths.max(initial=0))
        assert longest <= max_tokens, f"an example of {longest} tokens cannot lie in a micro-batch of {max_tokens}"
        self.micro_batches = 1
        for epoch in range(self.epochs):
            for block in self._blocks(epoch):
                lengths_of = self.lengths[block]
                enough = -(-int(lengths_of.sum(axis=1).max()) // (world_size * max_tokens))
                self.micro_batches = max(self.micro_batches, enough)
                while not fits(lengths_of, world_size * self.micro_batches, max_tokens):
                    self.micro_batches += 1

    @classmethod
    def of(
        cls, args: transformers.TrainingArguments, lengths: np.ndarray, arithmetic: Arithmetic, **size: int
    ) -> "PackedBatchSampler":
        """The sampler of a run: what the padded recipe fixes, and `max_tokens` or `padded`.

        Raises:
            UserError: an example is longer than the budget, or this process sees several GPUs.
        """
        if args.n_gpu > 1:
            raise UserError(
                f"this process sees {args.n_gpu} GPUs. Start it with torchrun --nproc_per_node={args.n_gpu}."
            )
        if "padded" not in size and lengths.max() > size["max_tokens"]:
            raise UserError(
                f"--tokens_per_micro_batch {size['max_tokens']}: the longest example has {lengths.max()} tokens and cannot be split. "
                "Give at least that, auto, or a smaller --model_max_length."
            )
        return cls(
            lengths,
            examples_per_step=arithmetic.examples_per_step,
            world_size=args.world_size,
            rank=args.process_index,
            seed=args.seed if args.data_seed is None else args.data_seed,
            epochs=-(-arithmetic.steps // arithmetic.steps_per_epoch),
            drop_last=args.dataloader_drop_last,
            **size,  # type: ignore[arg-type]
        )

    def _blocks(self, epoch: int) -> Iterator[np.ndarray]:
        """Example indices, (steps, examples per step): the whole steps of an epoch, then the last partial one."""
        examples = len(self.lengths)
        order = permutation(examples, self.seed, epoch) if self.shuffle else np.arange(examples)
        whole = examples - examples % self.examples_per_step
        if whole:
            yield order[:whole].reshape(-1, self.examples_per_step)
        if whole < examples and not self.drop_last:
            yield order[None, whole:]

    def fullest(self) -> int:
        """Tokens of the largest micro-batch of the run."""
        bins = self.world_size * self.micro_batches
        blocks = (block for epoch in range(self.epochs) for block in self._blocks(epoch))
        return max(int(balance(self.lengths[block], bins)[1].max()) for block in blocks)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps * self.micro_batches

    def __iter__(self) -> Iterator[list[int]]:
        bins = self.world_size * self.micro_batches
        for block in self._blocks(self.epoch):
            for start in range(0, len(block), 1024):
                steps = block[start : start + 1024]
                bin_of, order = self._share(steps, bins)
                for step, bin_of_example, order_of_bins in zip(steps, bin_of, order):
                    for number in order_of_bins[self.rank :: self.world_size]:
                        yield step[bin_of_example == number].tolist()

    def _share(self, steps: np.ndarray, bins: int) -> tuple[np.ndarray, np.ndarray]:
        """The bin of each example, and the bins in the order in which the ranks take them side by side."""
        if self.padded:
            bin_of = np.broadcast_to(np.arange(steps.shape[1]) // self.padded, steps.shape)
            return bin_of, np.broadcast_to(np.arange(bins), (len(steps), bins))
        bin_of, loads = balance(self.lengths[steps], bins)
        order = np.argsort(-loads, axis=1, kind="stable").reshape(len(steps), self.micro_batches, self.world_size)
        # side by side nearly one size, and the larger share goes to each end in turn
        order[:, 1::2] = order[:, 1::2, ::-1]
        return bin_of, order.reshape(len(steps), bins)


@dataclass
class Packing:
    """What packing makes of a padded recipe. Padding is counted over the first epoch."""

    per_device: int
    accumulation: int  # asked for
    max_length: int
    max_tokens: int  # in one micro-batch
    micro_batches: int  # of each rank in each step
    fullest: int  # tokens in the largest micro-batch
    fill: float  # tokens / (micro-batches x the largest one)
    padding_saved: float  # share of the padded run's tokens that were padding
    reason: str  # why the budget is what it is

    def __str__(self) -> str:
        return (
            f"packing: {self.micro_batches} micro-batch{'es' * (self.micro_batches > 1)} per step and device, of at most {self.fullest:,} "
            f"tokens and {self.fill * self.fullest:,.0f} on average (limit {self.max_tokens:,}: {self.reason}); a padded run takes "
            f"{self.accumulation} of {self.per_device} x {self.max_length:,}, {self.padding_saved:.0%} of it padding"
        )


def describe(sampler: PackedBatchSampler, per_device: int, accumulation: int, max_length: int, reason: str) -> Packing:
    """Measure a sampler's first epoch against the padded run of the same recipe."""
    bins = sampler.world_size * sampler.micro_batches
    tokens = padded = 0
    fullest = sampler.fullest()
    for block in sampler._blocks(0):
        lengths = sampler.lengths[block]
        tokens += int(lengths.sum())
        for start in range(0, lengths.shape[1], per_device):
            # the padded run pads each micro-batch to its longest example
            micro_batch = lengths[:, start : start + per_device]
            padded += int(micro_batch.max(axis=1).sum()) * micro_batch.shape[1]
    fill = tokens / (sampler.steps * bins * fullest) if tokens else 0.0
    saved = 1 - tokens / padded if padded else 0.0
    return Packing(
        per_device, accumulation, max_length, sampler.max_tokens, sampler.micro_batches, fullest, fill, saved, reason
    )


def set_accumulation(args: transformers.TrainingArguments, micro_batches: int) -> None:
    """Tell the Trainer, and DeepSpeed, how many micro-batches a step has now."""
    args.gradient_accumulation_steps = micro_batches
    if args.deepspeed:  # it was told the batch sizes when the arguments were parsed
        config = args.hf_deepspeed_config.config
        config["gradient_accumulation_steps"] = micro_batches
        config["train_batch_size"] = args.per_device_train_batch_size * micro_batches * args.world_size

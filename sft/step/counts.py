"""Count what micro-batches hold: tokens, trained tokens, padding. It happens where they are collated, so that no GPU is asked."""

from collections.abc import Callable
from dataclasses import astuple, dataclass

import torch

from sft import IGNORE_INDEX


@dataclass
class TokenCounts:
    """What some micro-batches held.

    Two examples of 2 and 3 tokens, 1 and 2 of them trained, in a padded batch of 2 x 3:
    TokenCounts(real=5, trained=3, computed=6, squared=13, shared=0)
    """

    real: int = 0  # tokens of examples
    trained: int = 0  # positions with a label that is learned; an example's first token is never one
    computed: int = 0  # positions that the model computes, padding included
    squared: int = 0  # sum of len(example)^2 - len(its shared prefix)^2
    shared: int = 0  # tokens of shared prefixes that another example holds: real, but not computed

    def padding_share(self) -> float:
        """Computed positions that are padding, 0 to 1."""
        return 1 - (self.real - self.shared) / self.computed if self.computed else 0.0

    def __add__(self, other: "TokenCounts") -> "TokenCounts":
        return TokenCounts(*map(sum, zip(astuple(self), astuple(other))))


class CountingCollator:
    """A collator whose batches carry their `TokenCounts` under the key "counts".

    Counting happens here because the batch is still on the CPU (in a worker process, where there are workers), and the
    numbers travel with the batch they describe, whatever is prefetched or skipped. `take_counts` removes them again.
    """

    def __init__(self, collator: Callable[[list[dict]], dict]):
        self.collator = collator

    def __call__(self, examples: list[dict[str, torch.Tensor]]) -> dict:
        batch = self.collator(examples)
        lengths = [len(example["input_ids"]) for example in examples]
        prefixes = batch["prefix_lengths"].tolist() if "prefix_lengths" in batch else []
        batch["counts"] = TokenCounts(
            real=sum(lengths),
            trained=sum(int((example["labels"][1:] != IGNORE_INDEX).sum()) for example in examples),
            computed=batch["input_ids"].numel(),
            squared=sum(length * length for length in lengths) - sum(length * length for length in prefixes),
            shared=sum(prefixes),
        )
        return batch


def take_counts(batches: list[dict]) -> TokenCounts:
    """Remove the counts from the batches and return their sum."""
    return sum((batch.pop("counts") for batch in batches), TokenCounts())

"""Beginnings that prompts of one packed row have in common, computed once.

Instructions are wrapped in one template or two, and in a causal model a token's hidden states depend on the tokens before it alone.
So where two examples begin alike, one of them (the leader) holds the beginning for both, and the other follows with the rest of its
tokens, whose attention sees the leader's beginning and then its own tokens. Losses and gradients stay the same up to rounding.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch

IGNORE_INDEX = -100
LEAST = 8  # tokens in common that are worth the bookkeeping
GROUP = 1024  # tokens of a leader and its followers: the gradient of what they share is the work of one block, over all of them


class Choice(NamedTuple):
    """Whether prefixes are shared, and why."""

    on: bool
    reason: str

    def __str__(self) -> str:
        return f"shared prefixes: {'on' if self.on else 'off'} ({self.reason})"


class Sharing(NamedTuple):
    """How the examples lie in a row: by place, the first place is 0."""

    order: list[int]  # which example lies there
    leaders: list[int]  # the place of the example that holds its beginning; its own place where it shares none
    lengths: list[int]  # tokens that its leader holds for it


def choose(args: Any, model: Any, kernels: Sequence[str]) -> Choice:
    """Decide whether a run shares prefixes: where it changes nothing but rounding.

    Args:
        args: the run's TrainingArguments.
        model: to be trained.
        kernels: names of the attention implementations that can let a token see two places of a row.
    """
    kernel, config = model.config._attn_implementation, model.config
    if not args.share_prefixes:
        return Choice(False, "--share_prefixes")
    if kernel not in kernels:
        return Choice(False, f"{kernel} attention cannot; {' and '.join(kernels)} can")
    if getattr(config, "sliding_window", None):
        return Choice(False, f"attention over a sliding window of {config.sliding_window} tokens")
    dropout = any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.modules())
    if dropout or getattr(config, "attention_dropout", 0.0) > 0 or args.neftune_noise_alpha:
        return Choice(False, "dropout or noise is drawn for each example")
    return Choice(True, "what prompts of a micro-batch begin with alike is computed once")


def with_share(choice: Choice, micro_batches: Iterable[list[dict[str, Any]]]) -> Choice:
    """The same, with how many of these micro-batches' tokens need not be computed."""
    if not choice.on:
        return choice
    shared = tokens = 0
    for examples in micro_batches:
        shared += sum(share(examples).lengths)
        tokens += sum(len(example["input_ids"]) for example in examples)
    return choice._replace(reason=f"{choice.reason}: {shared / max(tokens, 1):.0%} of the first {tokens:,} tokens")


def sharable(example: dict[str, Any]) -> np.ndarray:
    """The tokens that others may share: all before the prompt's last one, which predicts the first trained token."""
    labels = torch.as_tensor(example["labels"]).numpy()
    trained = labels != IGNORE_INDEX
    first = int(trained.argmax()) if trained.any() else len(labels)
    return torch.as_tensor(example["input_ids"]).numpy()[: max(first - 1, 0)]


def share(examples: list[dict[str, Any]]) -> Sharing:
    """Order a row's examples so that the most tokens are shared.

    Sorted by their tokens, examples that begin alike lie side by side, and what each has in common with the first of its
    group never grows along the group. Which neighbours make a group is chosen for the most tokens saved in all.

    Example:
        >>> prompts = [[1, *range(10, 20), 7, 8], [2, 3, 4], [1, *range(10, 20), 5, 6]]
        >>> share([{"input_ids": [*ids, 9], "labels": [-100] * len(ids) + [9]} for ids in prompts])
        Sharing(order=[2, 0, 1], leaders=[0, 0, 2], lengths=[0, 11, 0])
    """
    prompts = [sharable(example) for example in examples]
    keys = [prompt.astype(">u4").tobytes() for prompt in prompts]
    order = sorted(range(len(examples)), key=keys.__getitem__)
    common = [0, *(in_common(prompts[one], prompts[other]) for one, other in pairwise(order))]
    tokens = [len(examples[number]["input_ids"]) for number in order]
    saved = [0] * (len(order) + 1)  # the most that the examples from a place on can save
    ends = [0] * len(order)  # where the best group that begins at a place ends
    for first in reversed(range(len(order))):
        saved[first], ends[first] = saved[first + 1], first + 1
        shared, gain, size = tokens[first], 0, tokens[first]
        for place in range(first + 1, len(order)):
            shared = min(shared, common[place])
            gain, size = gain + shared, size + tokens[place] - shared
            if shared < LEAST or size > GROUP:
                break
            if gain + saved[place + 1] > saved[first]:
                saved[first], ends[first] = gain + saved[place + 1], place + 1
    leaders: list[int] = []
    lengths: list[int] = []
    while len(leaders) < len(order):
        leader, shared = len(leaders), tokens[len(leaders)]
        for place in range(leader, ends[leader]):
            shared = min(shared, common[place]) if place > leader else shared
            leaders.append(leader)
            lengths.append(shared if place > leader else 0)
    return Sharing(order, leaders, lengths)


def in_common(one: np.ndarray, other: np.ndarray) -> int:
    """How many tokens two examples begin with alike."""
    size = min(len(one), len(other))
    differ = one[:size] != other[:size]
    return int(differ.argmax()) if differ.any() else size

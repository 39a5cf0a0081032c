"""Join examples end to end in one row, and compute once what prompts have in common at their beginning: the collator.

Instructions are wrapped in one template or two, and in a causal model a token's hidden states depend on the tokens before it alone.
So where two examples begin alike, one of them (the leader) holds the beginning for both, and the other follows with the rest of its
tokens, whose attention sees the leader's beginning and then its own tokens. Losses and gradients stay the same up to rounding.
"""

from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch

from sft import IGNORE_INDEX
from sft.job import Choice
from sft.step.attention import SHARE_PREFIXES

# A micro-batch for a rank that has no example; two or more, so that compiled layers see no size 1.
PLACEHOLDER_TOKENS = 8


class PackedCollator:
    """Join examples end to end in one row.

    Returns `input_ids`, `labels`, `position_ids`, each (1, tokens); `cu_seq_lens_q/k`, int32, where each example starts and the
    last one ends; `max_length_q/k`, int; `label_positions` and `label_targets`, (trained tokens,): the positions whose logits
    are needed and what each must predict. There is no `attention_mask`: with one, transformers 5 lets examples see each other.
    No example at all makes a placeholder: it trains nothing and keeps this rank in step with the others.

    Args:
        share: (examples) -> their order in the row, and the beginnings that are left out of it because an example before has the
            same (`prefixes.share`). `prefix_starts` and `prefix_lengths`, int32, then say where each one's lies; (examples + 1,), because
            layers are compiled once more for a size of 1.

    Example:
        >>> row = PackedCollator()([{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4, 5], "labels": [-100, 5]}])
        >>> {key: value.tolist() for key, value in row.items() if torch.is_tensor(value) and key != "cu_seq_lens_k"}
        {'input_ids': [[1, 2, 3, 4, 5]], 'labels': [[-100, 2, 3, -100, 5]], 'position_ids': [[0, 1, 2, 0, 1]], \
'cu_seq_lens_q': [0, 3, 5], 'label_positions': [0, 1, 3], 'label_targets': [2, 3, 5]}
    """

    def __init__(self, share: Callable | None = None):
        self.share = share

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        if not examples:
            nothing = [IGNORE_INDEX] * PLACEHOLDER_TOKENS
            batch = self([{"input_ids": [0] * PLACEHOLDER_TOKENS, "labels": nothing}])
            batch["label_positions"] = torch.zeros(1, dtype=torch.int64)
            # the head still runs: the gradient is zero, not absent
            batch["label_targets"] = torch.full((1,), IGNORE_INDEX)
            return batch
        left_out = [0] * len(examples)
        if self.share:
            order, leaders, left_out = self.share(examples)
            examples = [examples[number] for number in order]
        parts = list(zip(examples, left_out))
        input_ids = torch.cat([torch.as_tensor(example["input_ids"])[begin:] for example, begin in parts])
        labels = torch.cat([torch.as_tensor(example["labels"])[begin:] for example, begin in parts])
        positions = [torch.arange(begin, len(example["input_ids"])) for example, begin in parts]
        lengths = torch.tensor([len(part) for part in positions])
        ends = lengths.cumsum(0)
        starts = ends - lengths
        labels[starts] = IGNORE_INDEX  # nothing precedes an example's first token
        label_positions = (labels[1:] != IGNORE_INDEX).nonzero().flatten()
        cu_seq_lens = torch.cat([torch.zeros(1, dtype=torch.int64), ends]).to(torch.int32)
        longest = int(lengths.max())
        batch = {
            "input_ids": input_ids[None],
            "labels": labels[None],
            "position_ids": torch.cat(positions)[None],
            "cu_seq_lens_q": cu_seq_lens,
            "cu_seq_lens_k": cu_seq_lens,
            "max_length_q": longest,
            "max_length_k": longest,
            "label_positions": label_positions,
            "label_targets": labels[label_positions + 1],
        }
        if self.share:
            batch["prefix_starts"] = starts[[*leaders, 0]].to(torch.int32)
            batch["prefix_lengths"] = torch.tensor([*left_out, 0], dtype=torch.int32)
        return batch


LEAST = 8  # tokens in common that are worth the bookkeeping
GROUP = 1024  # tokens of a leader and its followers: the gradient of what they share is the work of one block, over all of them


class Sharing(NamedTuple):
    """How the examples lie in a row: by place, the first place is 0."""

    order: list[int]  # which example lies there
    leaders: list[int]  # the place of the example that holds its beginning; its own place where it shares none
    lengths: list[int]  # tokens that its leader holds for it


def choose_prefixes(args: Any, config: Any, kernel: str, noisy: bool, length_decides: bool = False) -> Choice:
    """Decide whether a run shares prefixes: where it changes nothing but rounding.

    Args:
        kernel: name of the run's attention implementation.
        noisy: the model draws dropout.
        length_decides: rope's frequencies are not the same in all examples.
    """
    window = getattr(config, "sliding_window", None)
    refused = {
        "--share_prefixes": not args.share_prefixes,
        f"{kernel} attention cannot; {' and '.join(SHARE_PREFIXES)} can": kernel not in SHARE_PREFIXES,
        f"attention over a sliding window of {window} tokens": window,
        "rope's frequencies depend on an example's length": length_decides,
        "dropout or noise is drawn for each example": noisy or args.neftune_noise_alpha,
    }
    why = next((why for why, holds in refused.items() if holds), "")
    return Choice("shared prefixes", not why, why or "what prompts of a micro-batch begin with alike is computed once")


def measured_share(micro_batches: Iterable[list[dict[str, Any]]]) -> str:
    """How many of these micro-batches' tokens need not be computed, in words."""
    shared = tokens = 0
    for examples in micro_batches:
        shared += sum(group_by_prefix(examples).lengths)
        tokens += sum(len(example["input_ids"]) for example in examples)
    return f"{shared / max(tokens, 1):.0%} of the first {tokens:,} tokens"


def sharable(example: dict[str, Any]) -> np.ndarray:
    """The tokens that others may share: all before the prompt's last one, which predicts the first trained token."""
    labels = torch.as_tensor(example["labels"]).numpy()
    trained = labels != IGNORE_INDEX
    first = int(trained.argmax()) if trained.any() else len(labels)
    return torch.as_tensor(example["input_ids"]).numpy()[: max(first - 1, 0)]


def group_by_prefix(examples: list[dict[str, Any]]) -> Sharing:
    """Order a row's examples so that the most tokens are shared.

    Sorted by their tokens, examples that begin alike lie side by side, and what each has in common with the first of its
    group never grows along the group. Which neighbours make a group is chosen for the most tokens saved in all.

    Example:
        >>> prompts = [[1, *range(10, 20), 7, 8], [2, 3, 4], [1, *range(10, 20), 5, 6]]
        >>> group_by_prefix([{"input_ids": [*ids, 9], "labels": [-100] * len(ids) + [9]} for ids in prompts])
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

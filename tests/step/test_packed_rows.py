"""Shared prefixes: every token of every example, the padded run's losses and every gradient, in fewer computed tokens."""

import copy
import doctest
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_models import gradients, largest_error, padded_step, small_llama

from sft import IGNORE_INDEX
from sft.run import finite_check
from sft.step import packed_rows
from sft.step.counts import CountingCollator
from sft.step.loss import summed_loss
from sft.step.modules import exchange
from sft.step.packed_rows import GROUP, LEAST, PackedCollator, group_by_prefix


def test_drawn_example():
    assert doctest.testmod(packed_rows).failed == 0 and doctest.testmod(packed_rows).attempted >= 2


def example(prompt: list[int], response: list[int]) -> dict:
    ids = torch.tensor([*prompt, *response])
    labels = ids.clone()
    labels[: len(prompt)] = IGNORE_INDEX
    return {"input_ids": ids, "labels": labels}


def unpacked(row: dict) -> list[list[tuple[int, int, bool]]]:
    """(id, position, whether the next token is trained on) of each token of each example, prefixes put back."""
    trained = torch.zeros(row["input_ids"].shape[1], dtype=torch.bool)
    trained[row["label_positions"]] = True
    tokens = list(zip(row["input_ids"][0].tolist(), row["position_ids"][0].tolist(), trained.tolist()))
    starts, shared = row["prefix_starts"].tolist(), row["prefix_lengths"].tolist()
    edges = row["cu_seq_lens_q"].tolist()
    return [
        tokens[start : start + length] + tokens[edges[number] : edges[number + 1]]
        for number, (start, length) in enumerate(zip(starts[:-1], shared[:-1], strict=True))
    ]


IDS = st.lists(st.integers(0, 2), max_size=30)  # three ids: many begin alike
EXAMPLES = st.lists(st.tuples(IDS, st.lists(st.integers(0, 2), min_size=1, max_size=6)), min_size=1, max_size=25)


@settings(max_examples=100, deadline=None)
@given(EXAMPLES, st.booleans())
def test_any_examples_are_all_there(pairs, templated):
    template = [5, 6, 7, 8, 9, 5, 6, 7, 8, 9] if templated else []
    examples = [example([*template, *prompt], response) for prompt, response in pairs]
    row = PackedCollator(group_by_prefix)(examples)
    expected = []
    for one in examples:
        ids, labels = one["input_ids"].tolist(), one["labels"].tolist()
        next_is_trained = [label != IGNORE_INDEX for label in labels[1:]] + [False]
        expected.append(list(zip(ids, range(len(ids)), next_is_trained)))
    assert sorted(unpacked(row)) == sorted(expected)
    assert torch.equal(row["label_targets"], row["labels"][0][row["label_positions"] + 1])
    _, leaders, lengths = group_by_prefix(examples)
    for place, (leader, length) in enumerate(zip(leaders, lengths)):
        assert length == 0 if leader == place else length >= LEAST
        if leader != place:  # as the kernel needs them: side by side, and none shares more than the one before
            assert leaders[place - 1] == leader and (place - 1 == leader or lengths[place - 1] >= length)
    counts = CountingCollator(PackedCollator(group_by_prefix))(examples)["counts"]
    assert counts.real - counts.shared == counts.computed == row["input_ids"].numel()
    assert counts.padding_share() == 0
    pairs = sum(length * (length + 2 * before) for length, before in zip(row["cu_seq_lens_q"].diff().tolist(), lengths))
    assert counts.squared == pairs


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(8, 12), st.integers(0, 3)), min_size=1, max_size=7))
def test_no_other_grouping_saves_more(shapes):
    examples = [example([first] * length + [10 + last, 4], [3]) for first, length, last in shapes]
    prompts = sorted(one["input_ids"].tolist()[: len(one["input_ids"]) - 2] for one in examples)

    def in_common(one: list[int], other: list[int]) -> int:
        length = next((n for n, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))
        return length if length >= LEAST else -1000

    best = 0
    for cuts in range(2 ** (len(prompts) - 1)):
        leader, total = 0, 0
        for place in range(1, len(prompts)):
            if cuts >> (place - 1) & 1:
                leader = place
            else:
                total += in_common(prompts[leader], prompts[place])
        best = max(best, total)
    assert sum(group_by_prefix(examples).lengths) == best


def test_a_group_has_a_limit():
    examples = [example([1] * 20 + [number], [7] * 100) for number in range(60)]
    _, leaders, lengths = group_by_prefix(examples)
    sizes = [sum(121 - n for n, other in zip(lengths, leaders) if other == leader) for leader in set(leaders)]
    assert GROUP - 101 < max(sizes) <= GROUP and len(sizes) == 7


def templated_rows(count: int) -> list[dict]:
    """Examples of 30 to 70 tokens under two templates, each a conversation of two turns; some share more, and two have the same prompt."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda size: torch.randint(0, 211, (size,), generator=generator).tolist()  # noqa: E731
    templates, made = [draw(15), draw(19)], []
    for number in range(count):
        prompt = templates[number % 2] + ([7, 7, 7, 7] if number % 3 else []) + draw(4 + number)
        made.append(example(prompt, draw(5 + 2 * number)))
        made[-1]["labels"][-4:-2] = IGNORE_INDEX  # a question between two answers
    return [*made, example(made[0]["input_ids"][:19].tolist(), draw(9))]


def shared_step(model, micro_batches: list[list[dict]], change=lambda row: row):
    """As `packed_step` with shared prefixes; also the tokens computed."""
    model.zero_grad()
    head = exchange(model)
    rows = [change(PackedCollator(group_by_prefix)(examples)) for examples in micro_batches]
    tokens = sum(len(row["label_targets"]) for row in rows)
    losses = [summed_loss(model, head, row) / tokens for row in rows]
    sum(losses).backward()
    return float(sum(losses).detach()), gradients(model), sum(row["input_ids"].numel() for row in rows)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_padded_losses_and_gradients(checkpointing):
    padded_model, data = small_llama(attn_implementation="sdpa"), templated_rows(12)
    model = copy.deepcopy(padded_model)
    model.set_attn_implementation("per_example")
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    loss, expected = padded_step(padded_model, [data[:5], data[5:]])
    for micro_batches in ([data], [data[:6], data[6:]], [data[::2], data[1::2]]):
        found_loss, found, computed = shared_step(model, micro_batches)
        assert found_loss == pytest.approx(float(loss), rel=2e-6)
        assert largest_error(found, expected) < 5e-6
        assert computed < 0.75 * sum(len(one["input_ids"]) for one in data)


FAULTS = {
    "a token of the prefix unseen": lambda row: row | {"prefix_lengths": (row["prefix_lengths"] - 1).clamp(min=0)},
    "no prefix": lambda row: row | {"prefix_lengths": torch.zeros_like(row["prefix_lengths"])},
    "another's prefix": lambda row: row | {"prefix_starts": row["prefix_starts"].flip(0)},
    "positions not continued": lambda row: (
        row
        | {
            "position_ids": torch.cat([torch.arange(n) for n in row["cu_seq_lens_q"].diff().tolist()])[None],
        }
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_prefix_is_seen(fault):
    """The comparison above can fail: each fault alone moves the gradient far beyond rounding."""
    model, data = small_llama(attn_implementation="sdpa"), templated_rows(12)
    _, expected = padded_step(model, [data])
    model.set_attn_implementation("per_example")
    _, found, _ = shared_step(model, [data], FAULTS[fault])
    assert largest_error(found, expected) > 1e-2


@pytest.mark.parametrize(
    "changed, why",
    [
        ({}, "on (what prompts"),
        ({"share_prefixes": False}, "off (--share_prefixes)"),
        ({"kernel": "varlen"}, "off (varlen attention cannot; triton and per_example can)"),
        ({"sliding_window": 64}, "off (attention over a sliding window of 64 tokens)"),
        ({"neftune_noise_alpha": 5.0}, "off (dropout or noise is drawn for each example)"),
        ({"noisy": True}, "off (dropout or noise is drawn for each example)"),
        ({"length_decides": True}, "off (rope's frequencies depend on an example's length)"),
    ],
)
def test_the_choice_says_why(changed, why):
    run = {
        "share_prefixes": True,
        "neftune_noise_alpha": None,
        "sliding_window": None,
        "kernel": "per_example",
        "noisy": False,
        "length_decides": False,
    }
    given = SimpleNamespace(**(run | changed))
    choice = packed_rows.choose_prefixes(given, given, given.kernel, given.noisy, given.length_decides)
    assert f"shared prefixes: {why}" in str(choice)


class Rows:
    """What `finite_check.rows_of` needs of a dataset."""

    def __init__(self, data: list[dict]):
        self.data = data
        self.lengths = np.array([len(one["input_ids"]) for one in data])

    def __getitem__(self, index: int) -> dict:
        return self.data[index]

    def where(self, index: int) -> str:
        return f"row {10 + index}"


def test_what_is_saved_is_said():
    data = templated_rows(6)
    shared = sum(group_by_prefix(data[:3]).lengths) + sum(group_by_prefix(data[3:]).lengths)
    tokens = sum(len(one["input_ids"]) for one in data)
    said = packed_rows.measured_share([data[:3], data[3:], []])
    assert said == f"{shared / tokens:.0%} of the first {tokens} tokens" and shared > 30
    assert packed_rows.measured_share([[]]) == "0% of the first 0 tokens"


def test_rows_are_found_by_their_tokens():
    data = templated_rows(6)
    assert finite_check.rows_of(PackedCollator(group_by_prefix)(data[1:5]), Rows(data)) == [
        f"row {number}" for number in (11, 12, 13, 14)
    ]

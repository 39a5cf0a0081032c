"""What a batch holds is counted where it is collated."""

import torch

from sft.step.counts import CountingCollator, TokenCounts, take_counts


def examples():
    """Two examples: 3 tokens of which 1 is trained, and 5 of which 2 are."""
    return [
        {"input_ids": torch.tensor([1, 2, 3]), "labels": torch.tensor([-100, -100, 3])},
        {"input_ids": torch.tensor([1, 2, 3, 4, 5]), "labels": torch.tensor([-100, -100, -100, 4, 5])},
    ]


def padded(batch):
    width = max(len(example["input_ids"]) for example in batch)
    return {"input_ids": torch.zeros(len(batch), width), "labels": torch.zeros(len(batch), width)}


def packed(batch):
    return {"input_ids": torch.cat([example["input_ids"] for example in batch])[None]}


def test_counts_travel_with_the_batch():
    padded_batch = CountingCollator(padded)(examples())
    packed_batch = CountingCollator(packed)(examples())
    assert padded_batch["counts"] == TokenCounts(real=8, trained=3, computed=10, squared=9 + 25)
    assert packed_batch["counts"] == TokenCounts(real=8, trained=3, computed=8, squared=9 + 25)
    assert take_counts([padded_batch, packed_batch]) == TokenCounts(16, 6, 18, 68)
    assert "counts" not in padded_batch and "counts" not in packed_batch  # the model must not see them


def test_a_label_on_the_first_token_is_not_trained():
    example = {"input_ids": torch.tensor([1, 2]), "labels": torch.tensor([1, 2])}  # nothing predicts a first token
    assert CountingCollator(packed)([example])["counts"].trained == 1


def test_a_shared_prefix_is_computed_once():
    """Examples of 3 and 5 tokens: 2 tokens of theirs are held by another example, and attended by nobody a second time."""
    batch = CountingCollator(lambda rows: {"input_ids": torch.zeros(1, 6), "prefix_lengths": torch.tensor([2])})(
        examples()
    )
    assert batch["counts"] == TokenCounts(real=8, trained=3, computed=6, squared=9 + 25 - 4, shared=2)
    assert batch["counts"].padding_share() == 0
    assert TokenCounts(real=8, shared=2, computed=8).padding_share() == 0.25

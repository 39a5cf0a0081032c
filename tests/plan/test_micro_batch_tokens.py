"""How far `--tokens_per_micro_batch auto` grows, on a card whose memory is told; tests on a GPU are in benchmarks/step_checks.py."""

from types import SimpleNamespace

import pytest
import torch

from sft.plan import micro_batch_tokens

MIB = 2**20
FLOOR, STEP, LAYERS = 2048, 30_000, 22
HEAD, LAYER = 0.25 * MIB, 0.05 * MIB  # bytes of a token outside the layers, and in each
PER_TOKEN = HEAD + LAYERS * LAYER  # 1.35 MiB


@pytest.fixture
def card(monkeypatch):
    """A card with `free` bytes, on which a trial step of some tokens leaves the peak that it must."""
    card = SimpleNamespace(free=80_000 * MIB, peak=0.0, trials=0)
    fakes = {
        "mem_get_info": lambda device: (card.free, 80_000 * MIB),
        "memory_reserved": lambda device: 0,
        "max_memory_allocated": lambda device: card.peak,
        "reset_peak_memory_stats": lambda device: None,
        "synchronize": lambda device: None,
        "empty_cache": lambda: None,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return card


def choose(
    card, trial=None, largest_step=STEP, beside=lambda tokens: 20_000 * MIB, **flags
) -> micro_batch_tokens.Budget:
    config = SimpleNamespace(num_hidden_layers=LAYERS, _attn_implementation="varlen")
    device = torch.device(flags.pop("device", "cuda"))
    weight = SimpleNamespace(device=device)
    model = SimpleNamespace(config=config, parameters=lambda: iter([weight]), training=True)
    model.train = model.zero_grad = lambda *_, **__: None
    args = {"tokens_per_micro_batch": "auto", "device": device, "world_size": 1}
    args |= {"per_device_train_batch_size": 2, "model_max_length": 1024} | flags

    def measured(model, tokens: int) -> None:
        card.trials += 1
        card.peak = 5_000 * MIB + tokens * (HEAD + config.num_hidden_layers * LAYER)

    found = micro_batch_tokens.choose_micro_batch_tokens(
        model, SimpleNamespace(**args), largest_step, lambda model: None, trial or measured, beside
    )
    assert config.num_hidden_layers == LAYERS, "the trials must leave the model whole"
    return found


def test_a_card_with_room_takes_the_whole_step(card):
    assert choose(card) == (STEP, "auto: a whole step; 1.35 MiB per token, room for 44,444")  # 60,000 / 1.35


def test_a_smaller_card_takes_what_it_has_room_for(card):
    card.free = 41_600 * MIB
    assert choose(card) == (16_000, "auto: 1.35 MiB per token, room for 16,000")  # 21,600 / 1.35


def test_gradients_lie_beside_the_activations_where_a_step_takes_several_micro_batches(card):
    card.free = 57_800 * MIB  # the step just does not fit: 28,000 tokens; then 4,000 MiB of gradients are in the way
    found = choose(card, beside=lambda tokens: (20_000 if tokens >= STEP else 24_000) * MIB)
    assert found.tokens == 25_037  # 33,800 / 1.35


@pytest.mark.parametrize("free", [20_000, 22_000, 19_000])
def test_never_below_the_padded_runs_micro_batch(card, free):
    card.free = free * MIB
    assert choose(card) == (FLOOR, "per device x --model_max_length; no room was found for more")


def test_a_trial_that_does_not_fit_ends_at_the_padded_runs_micro_batch(card):
    def full(model, tokens: int) -> None:
        raise torch.OutOfMemoryError("full")

    assert choose(card, trial=full).tokens == FLOOR


def test_what_needs_no_trial_has_none(card):
    assert choose(card, tokens_per_micro_batch="3000") == (3000, "--tokens_per_micro_batch")
    assert choose(card, device="cpu") == (FLOOR, "per device x --model_max_length")
    assert choose(card, largest_step=1500).reason == "per device x --model_max_length, more than any step has"
    assert choose(card, beside=None).reason == "per device x --model_max_length; without a memory plan it does not grow"
    assert card.trials == 0

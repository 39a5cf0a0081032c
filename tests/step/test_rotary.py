"""Rope whose frequencies depend on a text's length: each example of a packed row has those that it has alone."""

from contextlib import nullcontext
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from sft.job import UserError
from sft.plan import proof, settle
from sft.step import attention, modules, rotary
from sft.step.packed_rows import PackedCollator

LENGTHS = (12, 30, 8, 50, 16, 17)  # the frequencies change beyond 16
ROPES = {
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0] * 8,
        "long_factor": [1.0 + i for i in range(8)],
        "factor": 4.0,
        "original_max_position_embeddings": 16,
        "rope_theta": 1e4,
    },
    "dynamic": {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
}


def model_with(kind: str):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    positions = 16 if kind == "dynamic" else 64
    model = AutoModelForCausalLM.from_config(
        LlamaConfig(**sizes, max_position_embeddings=positions, rope_parameters=ROPES[kind])
    )
    for weight in model.parameters():
        weight.data *= 3 if weight.dim() > 1 else 1
    return model.eval()


def examples() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(64, (length,), generator=generator) for length in LENGTHS]
    return [{"input_ids": each, "labels": each.clone()} for each in ids]


def losses(kind: str, exchanged: bool) -> list[tuple[float, float]]:
    """(packed, alone) of each example; alone in a fresh model."""
    rows, packing = examples(), model_with(kind)
    packing.set_attn_implementation(attention.PER_EXAMPLE)
    way = proof.packed(packing, modules.exchange(packing), PackedCollator())
    if not exchanged:
        packing.model.rotary_emb.__class__ = type(model_with(kind).model.rotary_emb)
    with torch.no_grad():
        return [(way(rows, i).item(), proof.stock(model_with(kind), [row], 0).item()) for i, row in enumerate(rows)]


@pytest.mark.parametrize("kind", ROPES)
def test_each_example_has_the_frequencies_that_it_has_alone(kind):
    assert all(packed == pytest.approx(alone, rel=1e-5) for packed, alone in losses(kind, True))
    # as the longest example decides for all in transformers
    assert max(abs(packed / alone - 1) for packed, alone in losses(kind, False)) > 1e-4


@pytest.mark.parametrize("kind", ROPES)
def test_outside_of_packed_rows_the_module_is_the_models(kind):
    model, stock = model_with(kind), model_with(kind)
    modules.exchange(model)
    with torch.no_grad():
        model(input_ids=PackedCollator()(examples())["input_ids"])  # leaves no frequencies behind
        for ids in (torch.arange(10)[None], torch.arange(40).reshape(2, 20)):
            assert torch.equal(model(input_ids=ids).logits, stock(input_ids=ids).logits)
        written = [each.generate(torch.arange(10)[None], max_new_tokens=9, do_sample=False) for each in (model, stock)]
    assert torch.equal(*written)


@pytest.mark.parametrize("kind", ROPES)
@pytest.mark.parametrize("lengths", [(8, 17), (17, 8), (8, 16), (40, 20)])
def test_the_limit_itself_is_short_and_nothing_is_left_behind(kind, lengths):
    """17 tokens, with the positions 0 to 16, are the first that are too long for 16."""
    model = model_with(kind)
    modules.exchange(model)
    rope, hidden = model.model.rotary_emb, torch.zeros(1, 1)
    short = rope.inv_freq.clone()
    positions = [torch.arange(length)[None] for length in lengths]
    alone = [model_with(kind).model.rotary_emb(hidden, each) for each in positions]
    found = rope(hidden.expand(1, sum(lengths)), torch.cat(positions, dim=1))
    for each, (first, second) in zip(found, zip(*alone)):
        assert torch.equal(each, torch.cat([first, second], dim=1))
    # a padded batch that comes next, of the lengths in between, has the frequencies that a fresh module gives it
    assert kind == "longrope" or torch.equal(rope.inv_freq, short)


@pytest.mark.parametrize("kind", ROPES)
def test_a_padded_run_is_refused_where_the_longest_example_decides(kind):
    config, lengths = model_with(kind).config, np.array(LENGTHS)
    assert rotary.changes_beyond(config) == 16 and rotary.changes_beyond(LlamaConfig()) is None
    args = SimpleNamespace(per_device_train_batch_size=2, per_device_eval_batch_size=1)
    cure = "" if kind == "dynamic" else ", give --per_device_train_batch_size 1 --per_device_eval_batch_size 1"
    with pytest.raises(UserError, match="3 of 6 examples are longer than 16 tokens.* Leave --packing False out" + cure):
        settle.refuse_padded_rope(args, config, lengths)
    args.per_device_train_batch_size = 1
    with pytest.raises(UserError) if kind == "dynamic" else nullcontext():
        settle.refuse_padded_rope(args, config, lengths)
    args.per_device_eval_batch_size = 2
    with pytest.raises(UserError, match="in a padded run the longest example decides for others too"):
        settle.refuse_padded_rope(args, config, lengths)

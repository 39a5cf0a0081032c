"""Packed steps against padded ones: the same examples, the same losses, every gradient."""

import copy
import doctest
import json
import re
import time
from types import SimpleNamespace

import jobs
import numpy as np
import pytest
import torch
import transformers
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_models import gradients, largest_error, padded_step, rows, small_llama
from safetensors.torch import load_file
from torch.utils.data import DataLoader, RandomSampler

import utils
from sft import IGNORE_INDEX
from sft.data.llama_tokenizer import load_llama_tokenizer
from sft.job import UserError
from sft.run.trainer import SupervisedTrainer
from sft.step import micro_batches, packed_rows
from sft.step.loss import summed_loss
from sft.step.micro_batches import PackedBatchSampler, balance, describe, permutation
from sft.step.modules import exchange
from sft.step.packed_rows import PackedCollator


def test_drawn_examples():
    assert all(doctest.testmod(module).failed == 0 for module in (micro_batches, packed_rows))
    assert doctest.testmod(micro_batches).attempted >= 2 and doctest.testmod(packed_rows).attempted >= 4


def samplers(lengths, world_size, **options):
    return [PackedBatchSampler(lengths, world_size=world_size, rank=rank, **options) for rank in range(world_size)]


# ------------------------------------------------------------------------------------------------- who is in which step


def stock_order(examples: int, seed: int, epoch: int) -> list[int]:
    """The order that the Trainer's loader gives: a RandomSampler that Accelerate makes seedable."""
    loader = DataLoader(range(examples), batch_size=1, sampler=RandomSampler(range(examples)))
    loader = prepare_data_loader(loader, put_on_device=False, use_seedable_sampler=True, data_seed=seed)
    loader.set_epoch(epoch)
    return [int(batch) for batch in loader]


@pytest.mark.parametrize("seed, epoch", [(42, 0), (42, 1), (7, 3)])
def test_the_permutation_is_the_stock_trainers(seed, epoch):
    assert permutation(23, seed, epoch).tolist() == stock_order(23, seed, epoch)
    assert permutation(23, seed, epoch).tolist() != stock_order(23, seed, epoch + 1)


def test_several_ranks_share_the_stock_steps():
    """Stock Accelerate deals micro-batches of one permutation to the ranks in turn; the union over a step is ours."""
    examples, per_device, accumulation, ranks = 37, 2, 3, 2
    step_size = per_device * accumulation * ranks
    stock = []
    for rank in range(ranks):
        loader = DataLoader(range(examples), batch_size=per_device, sampler=RandomSampler(range(examples)))
        loader = prepare_data_loader(
            loader, num_processes=ranks, process_index=rank, put_on_device=False, use_seedable_sampler=True, data_seed=5
        )
        stock.append([batch.tolist() for batch in loader])
    whole_steps = examples // step_size
    for number in range(whole_steps):
        micro_batches = slice(number * accumulation, (number + 1) * accumulation)
        seen = sorted(index for rank in stock for batch in rank[micro_batches] for index in batch)
        assert seen == sorted(permutation(examples, 5, 0)[number * step_size : (number + 1) * step_size].tolist())
    # The stock loader fills the last round of micro-batches with examples from the beginning: here 37 become 40.
    assert sum(len(batch) for rank in stock for batch in rank) == 40
    ours = samplers([5] * examples, ranks, examples_per_step=step_size, max_tokens=10, seed=5, padded=per_device)
    assert list(ours[0])[: whole_steps * accumulation] == stock[0][: whole_steps * accumulation]
    assert sorted(index for rank in ours for batch in rank for index in batch) == list(range(examples))


def steps_of(ranks: list[PackedBatchSampler]) -> list[list[int]]:
    """The examples of each step, sorted, over all ranks; every rank must run as many micro-batches."""
    batches = [list(rank) for rank in ranks]
    assert {len(rank) for rank in batches} == {len(ranks[0])}
    size = ranks[0].micro_batches
    return [
        sorted(index for rank in batches for batch in rank[first : first + size] for index in batch)
        for first in range(0, len(ranks[0]), size)
    ]


LENGTHS = st.one_of(
    st.lists(st.integers(1, 64), min_size=1, max_size=60),
    st.integers(1, 60).map(lambda count: [64] * count),  # all equal, all full
    st.integers(1, 200).map(lambda count: [1] * count),  # many tiny
    st.lists(st.integers(1, 3), min_size=0, max_size=40).map(lambda tiny: [*tiny, 64]),  # one giant
)


@settings(max_examples=150, deadline=None)
@given(
    LENGTHS, st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.integers(0, 3), st.booleans(), st.floats(0, 1)
)
def test_any_lengths_keep_the_recipe(lengths, per_device, accumulation, ranks, epoch, drop_last, share):
    step_size = per_device * accumulation * ranks
    budget = 64 + round(share * (per_device - 1) * 64)  # from the longest example to what the padded run has
    options = {"examples_per_step": step_size, "seed": 1, "drop_last": drop_last, "epochs": 4}
    ours = samplers(lengths, ranks, max_tokens=budget, **options)
    padded = samplers(lengths, ranks, max_tokens=budget, padded=per_device, **options)
    for sampler in ours + padded:
        sampler.set_epoch(epoch)
    order = permutation(len(lengths), 1, epoch).tolist()
    expected = [sorted(order[first : first + step_size]) for first in range(0, len(order), step_size)]
    if drop_last and len(order) % step_size:
        expected.pop()
    assert steps_of(ours) == steps_of(padded) == expected
    if budget == per_device * 64:
        assert ours[0].micro_batches <= accumulation  # the padded run's budget always suffices
    for rank in ours:
        assert all(sum(lengths[index] for index in batch) <= budget for batch in rank)


def test_the_number_of_micro_batches_is_the_smallest():
    lengths = [60, 60, 60, 60, 10, 10, 10, 10]
    assert PackedBatchSampler(lengths, 4, 1, 0, max_tokens=120, seed=0, shuffle=False).micro_batches == 2
    assert PackedBatchSampler(lengths, 4, 1, 0, max_tokens=240, seed=0, shuffle=False).micro_batches == 1
    assert PackedBatchSampler(lengths, 4, 2, 0, max_tokens=120, seed=0, shuffle=False).micro_batches == 1
    with pytest.raises(AssertionError, match="60 tokens cannot lie"):
        PackedBatchSampler(lengths, 4, 1, 0, max_tokens=59, seed=0)


def test_what_does_not_fit_by_a_token_takes_a_micro_batch_more():
    """Longest first, 3 2 2 and 3 2: the sum is 12, and the larger half 7."""
    lengths = [3, 3, 2, 2, 2]
    assert not micro_batches.fits(np.array([lengths]), 2, 6) and micro_batches.fits(np.array([lengths]), 2, 7)
    for budget, needed in ((6, 3), (7, 2)):
        sampler = PackedBatchSampler(lengths, 5, 1, 0, max_tokens=budget, seed=0, shuffle=False)
        assert sampler.micro_batches == needed
        assert max(sum(lengths[index] for index in batch) for batch in sampler) <= budget


def test_ranks_take_the_larger_share_in_turn():
    """Side by side lie the two largest, then the two smallest, and the rank that had the larger of two has the smaller next."""
    both = samplers([5, 8, 6, 7], 2, examples_per_step=4, max_tokens=8, seed=0, shuffle=False)
    assert [list(rank) for rank in both] == [[[1], [0]], [[3], [2]]]  # 8 + 5 and 7 + 6 tokens


def test_the_sampler_of_a_run():
    def made(rank=0, **given) -> PackedBatchSampler:
        args = {"n_gpu": 1, "world_size": 2, "process_index": rank, "seed": 1, "data_seed": None}
        args = SimpleNamespace(**(args | {"dataloader_drop_last": False} | given))
        arithmetic = SimpleNamespace(examples_per_step=4, steps=6, steps_per_epoch=3)
        return PackedBatchSampler.of(args, np.array([5, 8, 6, 7, 5, 8, 6, 7, 9]), arithmetic, max_tokens=9)

    def order(**given) -> list[list[int]]:
        return steps_of([made(rank, **given) for rank in (0, 1)])

    def shuffled(seed: int) -> list[list[int]]:
        drawn = permutation(9, seed, 0).tolist()
        return [sorted(drawn[start : start + 4]) for start in (0, 4, 8)]

    assert order() == shuffled(1)
    assert order(data_seed=5) == shuffled(5) and order(data_seed=0) == shuffled(0)
    assert order(dataloader_drop_last=True) == shuffled(1)[:2]
    assert (made().epochs, made(rank=1).rank) == (2, 1)
    with pytest.raises(UserError, match="sees 2 GPUs"):
        made(n_gpu=2)


@pytest.mark.parametrize("steps, epochs", [(1, 1), (2, 1), (3, 2), (4, 2), (5, 3)])
def test_the_number_of_micro_batches_fits_an_epoch_that_is_not_finished_too(steps, epochs):
    args = SimpleNamespace(n_gpu=1, world_size=1, process_index=0, seed=1, data_seed=None, dataloader_drop_last=False)
    arithmetic = SimpleNamespace(examples_per_step=4, steps=steps, steps_per_epoch=2)
    assert PackedBatchSampler.of(args, np.full(8, 5), arithmetic, max_tokens=20).epochs == epochs


def test_deepspeed_is_told_of_the_micro_batches_that_a_step_has_now():
    file = SimpleNamespace(config={"train_batch_size": 48, "gradient_accumulation_steps": 8})
    args = SimpleNamespace(per_device_train_batch_size=2, world_size=3, deepspeed="ds.json", hf_deepspeed_config=file)
    micro_batches.set_accumulation(args, 5)
    assert args.gradient_accumulation_steps == 5
    assert file.config == {"train_batch_size": 30, "gradient_accumulation_steps": 5}  # DeepSpeed compares the two


def test_bins_are_balanced():
    lengths = np.random.default_rng(0).integers(20, 1000, (50, 128))
    _, loads = balance(lengths, bins=8)
    assert (loads.max(axis=1) / loads.mean(axis=1)).max() < 1.03


def test_resume_skips_exactly_what_was_trained():
    lengths = list(range(1, 41))
    sampler = PackedBatchSampler(lengths, 8, 1, 0, max_tokens=80, seed=3, epochs=3)
    sampler.set_epoch(2)
    whole = list(sampler)
    fresh = PackedBatchSampler(lengths, 8, 1, 0, max_tokens=80, seed=3, epochs=3)
    loader = skip_first_batches(DataLoader(range(40), batch_sampler=fresh, collate_fn=list), 5)
    fresh.set_epoch(2)
    assert list(loader) == whole[5:]


def test_a_million_rows_are_planned_in_two_seconds():
    lengths = np.minimum(np.random.default_rng(0).lognormal(5.2, 0.6, 1_000_000).astype(int) + 5, 1024)
    start = time.perf_counter()
    sampler = PackedBatchSampler(lengths, 64, world_size=4, rank=1, max_tokens=2048, seed=0)
    plan = describe(sampler, per_device=2, accumulation=8, max_length=1024, reason="test")
    examples = sum(len(batch) for batch in sampler)
    assert time.perf_counter() - start < 4  # 0.3 s on an idle machine; planning and a whole epoch of batches
    assert 200_000 < examples < 300_000 and plan.micro_batches == 3 and 0.6 < plan.fill <= 1


def test_the_plan_line():
    sampler = PackedBatchSampler([10, 30, 20, 20], 4, 1, 0, max_tokens=80, seed=0, shuffle=False)
    assert str(describe(sampler, per_device=2, accumulation=2, max_length=40, reason="auto")) == (
        "packing: 1 micro-batch per step and device, of at most 80 tokens and 80 on average (limit 80: auto); "
        "a padded run takes 2 of 2 x 40, 20% of it padding"
    )


# ------------------------------------------------------------------------------------------------- losses and gradients


def packed_step(model, micro_batches: list[list[dict]]):
    model.zero_grad()
    head = exchange(model)
    batches = [PackedCollator()(examples) for examples in micro_batches]
    tokens = sum((batch["labels"][:, 1:] != IGNORE_INDEX).sum() for batch in batches)
    loss = torch.zeros(())
    for batch in batches:
        part = summed_loss(model, head, batch) / tokens
        part.backward()
        loss += part.detach()
    return loss, gradients(model)


def test_packed_steps_give_the_padded_losses_and_gradients():
    padded_model = small_llama(attn_implementation="sdpa")
    packed_model = copy.deepcopy(padded_model)
    packed_model.set_attn_implementation("per_example")
    data = rows(23)
    lengths = [len(example["input_ids"]) for example in data]
    options = {"examples_per_step": 8, "world_size": 1, "rank": 0, "seed": 0}
    reference = PackedBatchSampler(lengths, max_tokens=120, padded=2, **options)
    expected = []
    batches = list(reference)
    for first in range(0, len(reference), reference.micro_batches):
        micro_batches = [[data[index] for index in batch] for batch in batches[first : first + reference.micro_batches]]
        expected.append(padded_step(padded_model, [batch for batch in micro_batches if batch]))
    losses = [float(loss) for loss, _ in expected]
    assert max(losses) - min(losses) > 0.1, "steps that all lose the same would prove nothing"
    counts = set()
    for budget in (60, 90, 120, 10_000):
        sampler = PackedBatchSampler(lengths, max_tokens=budget, **options)
        counts.add(sampler.micro_batches)
        batches = list(sampler)
        for number, (loss, gradient) in enumerate(expected):
            part = batches[number * sampler.micro_batches : (number + 1) * sampler.micro_batches]
            found_loss, found = packed_step(packed_model, [[data[index] for index in batch] for batch in part])
            assert float(found_loss) == pytest.approx(float(loss), rel=2e-6)
            assert largest_error(found, gradient) < 5e-6
    assert len(counts) >= 3


def test_tied_embeddings_and_one_head_group():
    padded_model = small_llama(attn_implementation="sdpa", tie_word_embeddings=True, num_key_value_heads=4)
    packed_model = copy.deepcopy(padded_model)
    packed_model.set_attn_implementation("per_example")
    data = rows(6)
    loss, expected = padded_step(padded_model, [data[:3], data[3:]])
    found_loss, found = packed_step(packed_model, [data])
    assert float(found_loss) == pytest.approx(float(loss), rel=2e-6) and largest_error(found, expected) < 5e-6


@pytest.mark.parametrize("fault", ["positions not reset", "mask passed", "first label kept", "examples not kept apart"])
def test_a_wrong_packed_row_is_seen(fault):
    """The comparison above can fail: each fault alone moves the gradient far beyond rounding."""
    model = small_llama(attn_implementation="sdpa")
    data = rows(4)
    for example in data:
        example["labels"] = example[
            "input_ids"
        ].clone()  # no prompt masked: the first label would count if it were kept
    _, expected = padded_step(model, [data])
    batch = PackedCollator()(data)
    packed = {key: batch[key] for key in ("input_ids", "labels", "position_ids")}
    if fault == "positions not reset":
        packed["position_ids"] = torch.arange(batch["input_ids"].shape[1])[None]
    elif fault == "mask passed":
        packed["attention_mask"] = torch.ones_like(batch["input_ids"])
    elif fault == "first label kept":
        packed["labels"] = batch["input_ids"].clone()
    else:
        model.set_attn_implementation("per_example")
        packed |= {"cu_seq_lens_q": torch.tensor([0, batch["input_ids"].shape[1]], dtype=torch.int32)}
    tokens = (batch["labels"][:, 1:] != IGNORE_INDEX).sum()
    model.zero_grad()
    model(**packed, num_items_in_batch=tokens).loss.backward()
    assert largest_error(gradients(model), expected) > 1e-2


def test_a_placeholder_trains_nothing_and_reaches_every_parameter():
    model = small_llama(attn_implementation="per_example")
    batch = PackedCollator()([])
    assert (batch["labels"] == IGNORE_INDEX).all()
    loss = summed_loss(model, exchange(model), batch)
    loss.backward()
    assert loss.item() == 0.0
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in model.parameters())


# ----------------------------------------------------------------------------------------------------- fetched ahead


def test_the_next_steps_micro_batches_are_fetched_while_this_ones_are_worked_on(monkeypatch):
    """Each once and in order, over the end of an epoch, where nothing is left to fetch ahead."""
    fetched = []

    def get_batch_samples(self, iterator, count, device):
        batches = [{"number": number} for _, number in zip(range(count), iterator)]
        fetched.extend(batch["number"] for batch in batches)
        return batches, len(batches)

    monkeypatch.setattr(transformers.Trainer, "get_batch_samples", get_batch_samples)
    monkeypatch.setattr(transformers.Trainer, "training_step", lambda *_: torch.zeros(()))
    monkeypatch.setattr("sft.run.trainer.take_counts", lambda batches: 0)
    trainer = SupervisedTrainer.__new__(SupervisedTrainer)
    trainer.accelerator = SimpleNamespace(sync_gradients=False)
    trainer.message = SimpleNamespace(add=lambda *_: None)
    trainer.ahead, trainer.meter, trainer.captured = (None, None), None, None
    trainer.current_flos = 0
    seen = []
    for numbers in ([1, 2, 3, 4, 5], [6, 7, 8, 9, 10]):
        iterator = iter(numbers)
        for step in range(3):
            batches, count = trainer.get_batch_samples(iterator, 2, None)
            seen += [batch["number"] for batch in batches]
            for micro_batch, batch in enumerate(batches, start=1):
                trainer.accelerator.sync_gradients = micro_batch == count
                trainer.training_step(None, batch)
                ahead = min(2 * (step + 1 + (micro_batch == count)), 5)
                assert fetched[-1] == numbers[ahead - 1], (
                    "the last micro-batch of a step fetches the next step's, no other"
                )
    assert seen == fetched == list(range(1, 11))


# ------------------------------------------------------------------------------------------------------ the real script

RECIPE = "--num_train_epochs 2 --learning_rate 0.02 --optim sgd --max_grad_norm 0 --lr_scheduler_type constant --logging_steps 1"
RECIPE += " --model_max_length 64 --save_strategy no --disable_tqdm True --eval_split 0.05 --eval_strategy epoch --eval_samples 0"


@pytest.mark.slow
def test_the_script_gives_the_same_curve_padded_and_packed_on_one_and_two_ranks(
    tiny_llama, questions_csv, tmp_path, capfd
):
    """61 examples, 4 in a step: the last step of each epoch has one, and one of two ranks has none.

    Plain gradient descent without clipping: weights that end equal had equal gradients in each of the 32 steps.
    """
    runs = {
        "padded": (0, "--packing False --per_device_train_batch_size 2 --gradient_accumulation_steps 2"),
        "packed": (0, "--per_device_train_batch_size 2 --gradient_accumulation_steps 2"),
        "packed small": (
            0,
            "--per_device_train_batch_size 1 --gradient_accumulation_steps 4 --tokens_per_micro_batch 60",
        ),
        "padded 2": (2, "--packing False --per_device_train_batch_size 1 --gradient_accumulation_steps 2"),
        "packed 2": (2, "--per_device_train_batch_size 1 --gradient_accumulation_steps 2"),
    }
    curves, weights = {}, {}
    shared = ["--model_name_or_path", str(tiny_llama), "--data_path", str(questions_csv), *RECIPE.split()]
    (tmp_path / "template.txt").write_text(
        "An easy one: {instruction}", encoding="utf-8"
    )  # what prompts begin with alike
    shared += ["--data_cache_dir", str(tmp_path / "cache"), "--prompt_template", str(tmp_path / "template.txt")]
    for name, (processes, flags) in runs.items():
        output = tmp_path / name.replace(" ", "_")
        flags = [*shared, "--output_dir", str(output), *flags.split()]
        if processes:
            jobs.run(flags, processes, tmp_path / f"{output.name}.log")
        else:
            utils.train(load_llama_tokenizer, flags)
        report = json.loads((output / "run_report.json").read_text())
        curves[name] = [entry["loss"] for entry in report["log"]]
        curves[name] += [entry["eval_loss"] for entry in report["evaluations"]]
        assert (report["final"]["shared_share"] > 0.1) == name.startswith("packed"), name
        weights[name] = load_file(output / "model.safetensors")
    printed = capfd.readouterr().out
    reference = curves.pop("padded")
    assert len(reference) == 32 + 2
    assert reference[0] - reference[31] > 0.3, "a model that does not move would prove nothing"
    for name, curve in curves.items():
        assert curve == pytest.approx(reference, rel=1e-6), name
        assert largest_error(weights[name], weights["padded"]) < 1e-6, name
    assert "attention: per_example (cpu, float32, head_dim 8)" in printed
    assert re.search(r"packing: 1 micro-batch per .* \(limit 128: .* a padded run takes 2 of 2 x 64, ", printed)
    assert re.search(r"packing: 2 micro-batches per .* \(limit 60: --tokens_per_micro_batch\)", printed)
    with pytest.raises(UserError, match="--tokens_per_micro_batch 8: the longest example has"):
        utils.train(
            load_llama_tokenizer, [*shared, "--output_dir", str(tmp_path / "none"), "--tokens_per_micro_batch", "8"]
        )

"""Each choice of a run is made once, printed once with its reason, and is what the run then does."""

import contextlib
import dataclasses
import inspect
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scripts import ROOT, save_llama
from transformers import AutoConfig
from watched import watch

from sft.arithmetic import Arithmetic, Precision
from sft.flags import ModelArguments, TrainingArguments
from sft.job import Choice
from sft.plan import memory_ladder, settle
from sft.run import trainer as trainer_module
from sft.step.micro_batches import PackedBatchSampler, describe

DECISIONS = {  # where each is asked for
    "arithmetic": (Arithmetic, "of"),
    "precision": (Precision, "of"),
    "attention": (settle, "packed_or_padded"),
    "proof": (settle, "prove"),
    "compiled layers": (settle, "choose_compilation"),
    "captured steps": (settle, "choose_capture"),
    "shared prefixes": (settle, "choose_prefixes"),
    "loss": (settle, "loss_kernel"),
    "token budget": (settle, "_token_budget"),
    "packing": (settle, "describe"),
    "memory plan": (memory_ladder, "plan"),
    "all": (settle, "settle"),
}


@pytest.fixture(scope="module")
def run(tiny_llama, questions_csv, tmp_path_factory):
    """Micro-batches of at most 70 tokens, several in a step: what was decided, how often, and what was trained on."""
    folder = tmp_path_factory.mktemp("settle")
    model = shutil.copytree(tiny_llama, folder / "model")  # another path: no other test has read its config
    asked, found, config_reads, trained = Counter(), {}, Counter(), []
    read_config, take_counts = AutoConfig.from_pretrained, trainer_module.take_counts

    def counted(name, real):
        def call(*args, **kwargs):
            asked[name] += 1
            found[name] = real(*args, **kwargs)
            return found[name]

        return call

    def counted_read(name, *args, **kwargs):
        caller = Path(inspect.currentframe().f_back.f_code.co_filename)
        config_reads[str(name)] += caller.is_relative_to(ROOT / "sft")  # transformers' loaders read it for themselves
        return read_config(name, *args, **kwargs)

    def noted(batches):
        trained.extend(batch["counts"].real for batch in batches)
        return take_counts(batches)

    with pytest.MonkeyPatch.context() as patch:
        for name, (home, attribute) in DECISIONS.items():
            patch.setattr(home, attribute, counted(name, getattr(home, attribute)))
        patch.setattr(AutoConfig, "from_pretrained", counted_read)
        patch.setattr(trainer_module, "take_counts", noted)
        recipe = "--per_device_train_batch_size 2 --gradient_accumulation_steps 3 --tokens_per_micro_batch 70"
        done = watch(model, questions_csv, folder / "out", recipe)
    return SimpleNamespace(
        settled=found["all"], asked=asked, config_reads=config_reads[str(model)], trained=trained, **vars(done)
    )


def test_each_choice_is_made_once(run):
    assert run.asked == dict.fromkeys(DECISIONS, 1)
    assert run.config_reads == 1


def test_each_choice_is_printed_once_with_its_reason(run):
    lines, settled = run.printed.splitlines(), run.settled
    for choice in (settled.attention, settled.compilation, settled.prefixes, settled.precision, settled.packing):
        assert lines.count(str(choice)) == 1, choice
    for what in ("attention", "proof", "compiled layers", "shared prefixes", "precision", "packing", "memory plan"):
        assert sum(line.startswith(f"{what}: ") for line in lines) == 1, what
    assert run.printed.count("examples per optimizer step") == 1
    assert run.printed.count("optimizer steps per epoch") == 1


def test_the_memory_plan_is_printed_for_the_micro_batches_that_run(run):
    packing, planned = run.record["packing"], run.record["memory_plan"]
    assert packing["micro_batches"] > 1
    assert len(run.trained) == packing["micro_batches"] * run.record["batch"]["steps"]
    assert max(run.trained) == packing["fullest"] == planned["tokens_per_micro_batch"] < 70
    assert f"  micro-batches of up to {packing['fullest']} tokens (several in a step)" in run.printed
    assert f"per step and device, of at most {packing['fullest']} tokens" in packing["line"]
    assert packing["max_tokens"] == 70 and packing["reason"] == "--tokens_per_micro_batch"


@pytest.mark.parametrize(
    ("config", "flags", "shares"),
    [
        ({}, {}, True),
        ({"attention_dropout": 0.1}, {}, False),
        ({}, {"use_lora": True}, False),  # its dropout is 0.05
        ({}, {"use_lora": True, "lora_dropout": 0.0}, True),
    ],
)
def test_prefixes_are_shared_where_no_dropout_is_drawn(run, tmp_path, monkeypatch, config, flags, shares):
    save_llama(tmp_path / "model", vocab_size=320, **config)
    kernel = Choice("attention", "per_example", "")
    monkeypatch.setattr(settle, "packed_or_padded", lambda *_: (kernel, run.settled.proofs))
    monkeypatch.setattr(memory_ladder, "plan", lambda *_: None)
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    model_args = ModelArguments(model_name_or_path=str(tmp_path / "model"), **flags)
    assert settle.settle(model_args, args, run.trainer.train_dataset).prefixes.value is shares


@pytest.mark.parametrize("fault", [None, "examples see each other"])
def test_every_rank_decides_by_rank_0s_proof(monkeypatch, fault):
    def broadcast(found):
        found[:] = [["of rank 0"], fault]

    monkeypatch.setenv("RANK", "1")
    monkeypatch.setattr(settle, "prove", lambda *_: pytest.fail("rank 1 made a proof of its own"))
    monkeypatch.setattr(settle.torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(settle.torch.distributed, "broadcast_object_list", broadcast)
    assert settle._proved() == (["of rank 0"], fault)


def test_the_token_budget_and_its_reason(monkeypatch):
    padded = "per device x --model_max_length"

    def budget(kernel="triton", largest=1000, plan=None, device="cuda", tokens=None) -> tuple:
        args = {"per_device_train_batch_size": 2, "model_max_length": 64, "tokens_per_micro_batch": tokens}
        args = SimpleNamespace(**args, device=torch.device(device), do_train=True)
        return settle._token_budget(None, args, None, kernel, largest, None, plan)[1:]

    monkeypatch.setattr(settle, "measured_tokens", lambda *given: Choice("", given[4:6], "measured"))
    assert budget(plan="a plan") == ((128, 1000), "measured")
    assert budget(plan="a plan", largest=10**6)[0] == (128, 65_536)
    assert budget(plan="a plan", largest=129)[1] == "measured"
    assert budget(plan="a plan", largest=128) == (128, f"{padded}, more than any step has")
    assert budget() == (128, f"{padded}; without a memory plan it does not grow")
    assert budget("sdpa", plan="a plan") == budget("eager", plan="a plan") == (128, padded)
    assert budget(device="cpu", plan="a plan") == (128, padded)
    assert budget(tokens=70) == (70, "--tokens_per_micro_batch")


def test_gathered_weights_are_kept_where_there_is_room():
    def chosen(fits=True, device="cuda", asked=None, ranks=2, reshard=True, plan=True) -> tuple | None:
        args = {
            "fsdp": True,
            "deepspeed": None,
            "fsdp_plugin_args": {"reshard_after_forward": reshard},
            "world_size": ranks,
        }
        args = SimpleNamespace(**args, keep_gathered_weights=asked, device=torch.device(device))
        kept = SimpleNamespace(gpu_peak=30 * 2**30, has_spare_room=fits)
        found = settle.choose_gathered(
            args, SimpleNamespace(gpu_peak=20 * 2**30, keeping_gathered=lambda: kept) if plan else None
        )
        return found and found[1:]

    assert chosen() == (True, "10.0 GiB more on each GPU")
    assert chosen(fits=False) == (False, "10.0 GiB more on each GPU, which are not there")
    assert chosen(asked=False) == (False, "--keep_gathered_weights")
    assert chosen(fits=False, asked=True)[0] is True
    assert not chosen(device="cpu")[0] and not chosen(plan=False)[0]
    assert chosen(ranks=1) is None, "nothing is gathered"
    assert chosen(reshard=False) is None, "--fsdp_config keeps them"


def test_what_is_settled_cannot_be_changed(run):
    for field in dataclasses.fields(settle.Settled):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(run.settled, field.name, None)


def test_the_run_does_what_is_settled(run):
    trainer, settled = run.trainer, run.settled
    assert trainer.sampler is settled.sampler
    assert trainer.head.kernel is settled.kernel
    assert trainer.model.config._attn_implementation == settled.attention.value == "per_example"
    assert trainer.args.gradient_accumulation_steps == settled.packing.micro_batches
    assert run.record["packing"]["shared_prefixes"] == str(settled.prefixes)
    assert settled.prefixes.value and run.record["final"]["shared_share"] > 0


# --------------------------------------------------------------------------------------------- the fullest is tried


@pytest.fixture
def tried(monkeypatch):
    """`rehearse_fullest` as on a GPU on which so many tokens fit: asked(room) -> what is settled, and what was tried."""
    lengths = np.array([40, 30, 20, 10] * 4)
    arithmetic = Arithmetic(1, 2, 2, 4, 4, 4)
    args = SimpleNamespace(
        device=SimpleNamespace(type="cuda"), world_size=1, fsdp=None, deepspeed=None, torch_compile=False
    )
    vars(args).update(do_train=True, n_gpu=1, process_index=0, seed=1, data_seed=None, dataloader_drop_last=False)
    model = SimpleNamespace(device=args.device, zero_grad=lambda: None)
    sampler = PackedBatchSampler.of(args, lengths, arithmetic, max_tokens=200)
    plan = SimpleNamespace(
        gpu={"optimizer": 7.0}, at=lambda *step: SimpleNamespace(gpu={"optimizer": 7.0}, at=plan.at, step=step)
    )
    monkeypatch.setattr(torch.random, "fork_rng", lambda devices: contextlib.nullcontext())

    def asked(room: int):
        seen = []

        def peak(model, head, tokens, times, others, args):
            seen.append((tokens, times, others))
            if tokens > room:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return 2**30

        monkeypatch.setattr(settle, "fullest_peak", peak)
        packing, on = describe(sampler, 2, 2, 100, "auto"), Choice("captured steps", True, "small")
        settled = settle.Settled(
            *[None] * 3, arithmetic, *[None] * 3, on, None, False, None, sampler, packing, [], [], plan
        )
        return settle.rehearse_fullest(model, "head", settled, args, lengths), seen

    return asked


def test_the_fullest_micro_batch_is_tried_and_stays_where_it_fits(tried, capsys):
    settled, seen = tried(room=10**6)
    assert seen == [(settled.packing.fullest, 1, 7.0)] and settled.packing.micro_batches == 1 and settled.capture.value
    assert "rehearsed: a micro-batch of " in capsys.readouterr().out


def test_steps_are_divided_until_their_fullest_micro_batch_fits(tried, capsys):
    whole = tried(room=10**6)[0].packing.fullest
    settled, seen = tried(room=60)
    fullest = settled.packing.fullest
    assert seen[0] == (whole, 1, 7.0) and seen[-1] == (fullest, 2, 7.0) and fullest <= 60 < seen[-2][0]
    # the same examples in each step, and the run's sampler, plan and choices are those that were tried
    assert (
        settled.sampler.micro_batches == settled.packing.micro_batches >= 2 and settled.sampler.examples_per_step == 4
    )
    assert settled.memory_plan.step == (fullest, settled.packing.micro_batches) and not settled.capture.value
    assert f"{seen[-2][0]:,} tokens did not fit when they were tried" in capsys.readouterr().out


def test_an_example_that_does_not_fit_by_itself_ends_the_run(tried):
    with pytest.raises(torch.OutOfMemoryError):
        tried(room=39)

"""What a plan advises, and what an out-of-memory becomes."""

import re

import pytest
import torch
from plans import OPEN_LLAMA_3B, OPEN_LLAMA_7B, flags, plan_of
from saved_runs import flags_for
from scripts import ROOT
from transformers import (
    FalconConfig,
)

import utils
from sft.data.llama_tokenizer import load_llama_tokenizer
from sft.job import UserError
from sft.plan import memory_ladder

pytestmark = pytest.mark.usefixtures("installed")


def test_an_architecture_whose_layer_needs_numbers_has_no_plan(capsys):
    parsed = flags("--plan_gpu_gib", "80")
    config = FalconConfig(num_hidden_layers=2, vocab_size=1000)
    assert memory_ladder.plan(parsed, parsed, config) is None
    assert capsys.readouterr().out == "memory plan: none, a layer of FalconConfig cannot be measured without memory\n"


@pytest.mark.parametrize(
    ("argv", "verdict"),
    [
        (["--tokens_per_micro_batch", "6000"], "--tokens_per_micro_batch 3000"),
        (["--tokens_per_micro_batch", "512"], "it fits"),
        (["--packing", "False", "--per_device_train_batch_size", "4"], "--gradient_checkpointing True"),
    ],
)
def test_the_verdict_names_the_cheapest_change_that_fits(argv, verdict):
    plan = plan_of(OPEN_LLAMA_3B, *argv, step_tokens=60_000)
    assert verdict in memory_ladder.verdict(plan)
    if not plan.fits:
        assert any(changed.fits for _, changed in memory_ladder.cheaper_runs(plan))


def test_a_7b_model_fits_one_card_with_recomputation_and_an_8_bit_optimizer():
    plan = plan_of(OPEN_LLAMA_7B, step_tokens=13_000)
    assert plan.tokens == 1858 and not plan.fits, "seven micro-batches"
    rungs = dict(memory_ladder.cheaper_runs(plan))
    assert not rungs["--gradient_checkpointing True"].fits
    carried = rungs["--gradient_checkpointing True --optim adamw_bnb_8bit"]
    assert carried.fits and carried.tokens == 13_000, "a whole step in one micro-batch: no gradients beside activations"
    few = "--tokens_per_micro_batch", "2048", "--gradient_checkpointing", "True", "--optim", "adamw_bnb_8bit"
    assert not plan_of(OPEN_LLAMA_7B, *few, step_tokens=13_000).fits
    qlora = (
        "--gradient_checkpointing",
        "True",
        "--use_lora",
        "True",
        "--load_in_4bit",
        "True",
        "--tokens_per_micro_batch",
        "2048",
    )
    assert plan_of(OPEN_LLAMA_7B, *qlora).gpu_peak < 8 * 2**30


def test_plan_only_needs_the_config_alone(tmp_path, capsys):
    OPEN_LLAMA_7B.save_pretrained(tmp_path)
    words = ["--model_name_or_path", str(tmp_path), "--bf16", "True", "--per_device_train_batch_size", "2"]
    words += [
        "--gradient_accumulation_steps",
        "8",
        "--model_max_length",
        "1024",
        "--plan_only",
        "True",
        "--plan_gpu_gib",
        "80",
    ]
    fsdp = ["--fsdp", "full_shard auto_wrap", "--fsdp_transformer_layer_cls_to_wrap", "LlamaDecoderLayer"]
    with pytest.raises(SystemExit) as ended:
        utils.train(load_llama_tokenizer, [*words, *fsdp, "--plan_world_size", "4"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "memory plan: 6.74 B parameters, 4 x 80.0 GiB GPU, FSDP\n" in said
    assert said[said.index("memory plan") :].count("\n") == 6 and "it fits" in said
    with pytest.raises(SystemExit):
        utils.train(
            load_llama_tokenizer, [*words, "--deepspeed", str(ROOT / "ds_config.json"), "--plan_world_size", "4"]
        )
    assert "4 x 80.0 GiB GPU, ZeRO stage 2, offloaded to the host" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        utils.train(load_llama_tokenizer, [*words, "--deepspeed", '{"zero_optimization": {"stage": 1}}'])
    said = capsys.readouterr().out
    assert "1 x 80.0 GiB GPU, ZeRO stage 1" in said and "it does not fit" in said and ended.value.code == 1


def test_a_plan_of_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match="its config cannot be loaded"):
        utils.train(load_llama_tokenizer, ["--model_name_or_path", str(tmp_path), "--plan_only", "True"])
    with pytest.raises(UserError, match="Add --plan_only True"):
        utils.train(load_llama_tokenizer, ["--model_name_or_path", str(tmp_path), "--plan_gpu_gib", "80"])
    OPEN_LLAMA_7B.save_pretrained(tmp_path)
    words = ["--model_name_or_path", str(tmp_path), "--plan_only", "True", "--deepspeed"]
    for file, problem in (
        ("missing.json", "there is no such file"),
        ('{"zero_optimization": {"stage": "2"}}', "stage is"),
    ):
        with pytest.raises(UserError, match=problem):
            utils.train(load_llama_tokenizer, [*words, file])


@pytest.mark.slow
def test_a_full_gpu_ends_in_a_sentence_and_exit_code_3(tiny_llama, questions_csv, tmp_path, monkeypatch, capsys):
    def full(*args):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.18 GiB of which 1 GiB is free."
        )

    monkeypatch.setattr("sft.run.trainer.summed_loss", full)
    words = flags_for(tiny_llama, questions_csv, tmp_path / "out")
    words += ["--data_cache_dir", str(tmp_path / "cache"), "--model_max_length", "64", "--save_strategy", "no"]
    with pytest.raises(SystemExit) as ended:
        utils.train(load_llama_tokenizer, [*words, "--per_device_train_batch_size", "4"])
    assert ended.value.code == 3
    said = capsys.readouterr()
    lines = said.err[said.err.index("error:") :].splitlines()
    assert lines[0] == "error: GPU memory is full (rank 0), in training. Tried to allocate 2.50 GiB."
    assert re.match(r"memory plan: 0\.0\d{3} B parameters, 1 process on the CPU, which holds the whole model", lines[1])
    assert "Traceback" not in said.err
    assert "memory plan:" in said.out, "the plan is said at the start too"


def test_the_sentence_says_where_the_run_was(capsys):
    with pytest.raises(SystemExit) as ended, memory_ladder.explain_out_of_memory(None, "load"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has …")
    assert ended.value.code == 3
    sentence = "error: GPU memory is full (rank 0), while the model was loaded. Tried to allocate 2.50 GiB.\n"
    assert capsys.readouterr().err == sentence


def test_the_sentence_names_what_to_try_next():
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has …")
    plan = plan_of(OPEN_LLAMA_3B, "--tokens_per_micro_batch", "4096", step_tokens=16_384)
    said = memory_ladder.describe_full(error, plan, "while the run was prepared")
    assert said.startswith(
        "error: GPU memory is full (rank 0), while the run was prepared. Tried to allocate 20.00 MiB.\nmemory plan:"
    )
    assert said.splitlines()[-1].startswith("  Try next: --tokens_per_micro_batch 2048 (planned: ")
    # a change that fits comes before a cheaper one that does not
    large = plan_of(OPEN_LLAMA_7B, step_tokens=13_000)
    (first, _), *_ = less = [
        run for run in memory_ladder.cheaper_runs(large) if run[1].gpu_peak < 0.95 * large.gpu_peak
    ]
    wanted = next(flags for flags, run in less if run.fits)
    assert first != wanted
    assert f"  Try next: {wanted} (planned: " in memory_ladder.describe_full(error, large, "in training")

"""The memory plan: its bytes are counted on real layers, its sums are done by hand, and an out-of-memory becomes a sentence."""

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import jobs
import pytest
import torch
from plans import OPEN_LLAMA_3B, OPEN_LLAMA_7B, TINY, TINY_LLAMA_1B, deepspeed_file, plan_of
from scripts import ROOT
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
)

from sft.plan import memory, memory_ladder, model_sizes

pytestmark = pytest.mark.usefixtures("installed")

GIB = 2**30


def flags_for(model, csv, folder) -> list[str]:
    return ["--model_name_or_path", str(model), "--data_path", str(csv), "--output_dir", str(folder / "out")]


# ----------------------------------------------------------------------------------------------------------- sums


def test_float32_training_takes_sixteen_bytes_for_each_parameter():
    plan = plan_of(OPEN_LLAMA_3B, "--tokens_per_micro_batch", "2048", step_tokens=4096)
    size = plan.shape.parameters
    assert [plan.gpu[part] / size for part in ("weights", "gradients", "optimizer")] == [4, 4, 8]
    assert plan.gpu["copies and gathers"] == 2 * 26 * (4 * 3200**2 + 3 * 3200 * 8640)  # autocast's bfloat16 layers
    layer = 22 * 3200 + 8 * 8640 + 8 * 3200 + 8 + 4 * 32  # 22 H + 8 I + 4 Q + 4 K, root mean squares and log-sums
    assert plan.gpu["activations"] == pytest.approx(2048 * (26 * layer + 16 * 3200), rel=1e-3)
    assert plan.host["loading or saving"] == 4 * size
    assert plan.fits and memory_ladder.describe(plan).count("\n") == 4


def test_one_micro_batch_per_step_needs_no_gradients_beside_activations():
    one = plan_of(OPEN_LLAMA_3B, "--tokens_per_micro_batch", "16384", step_tokens=16_384)
    many = plan_of(OPEN_LLAMA_3B, "--tokens_per_micro_batch", "16384", step_tokens=32_768)
    assert many.gpu_peak - one.gpu_peak == 4 * one.shape.parameters


def test_casts_are_gone_when_the_gradients_are_there():
    """With so few tokens the peak is at the end of the backward pass."""
    ask = "--per_device_train_batch_size", "1", "--model_max_length", "128", "--tokens_per_micro_batch", "128"
    assert plan_of(OPEN_LLAMA_3B, *ask, step_tokens=128).gpu["copies and gathers"] == 0


def test_micro_batches_are_planned_as_packing_makes_them():
    # 13,300 tokens with at most 4,096 in each: four of one size
    assert plan_of(OPEN_LLAMA_3B, "--tokens_per_micro_batch", "4096", step_tokens=13_300).tokens == 3325


@pytest.mark.parametrize(("ranks", "here"), [("4", 4), ("8", 8), ("16", 8)])
def test_a_machine_of_a_planned_job_has_up_to_eight_gpus(ranks, here):
    assert plan_of(OPEN_LLAMA_3B, "--plan_world_size", ranks).setting.ranks_here == here


def test_ranks_share_what_the_engine_shards():
    words = ["--tokens_per_micro_batch", "2048", "--plan_world_size", "4"]
    ddp = plan_of(OPEN_LLAMA_7B, *words)
    fsdp = plan_of(OPEN_LLAMA_7B, *words, "--fsdp", "true", "--fsdp_config", '{"cpu_ram_efficient_loading": true}')
    zero = plan_of(OPEN_LLAMA_7B, *words, "--deepspeed", str(ROOT / "ds_config.json"))
    size = ddp.shape.parameters
    assert ddp.gpu["weights"] == 4 * size and fsdp.gpu["weights"] == size and zero.gpu["weights"] == 2 * size
    assert ddp.gpu["optimizer"] == 8 * size and fsdp.gpu["optimizer"] == 2 * size and zero.gpu["optimizer"] == 0
    assert ddp.host["loading or saving"] == 4 * 4 * size, "each rank reads the model"
    # float32 weights, gathered on rank 0, and what is written of them: more than its reading of the model
    assert fsdp.host["loading or saving"] == (4 + 2) * size
    words += ["--use_lora", "True", "--fsdp", "true", "--fsdp_config"]
    once, each = (plan_of(OPEN_LLAMA_7B, *words, f'{{"cpu_ram_efficient_loading": {on}}}') for on in ("true", "false"))
    assert once.host["loading or saving"] == 2 * size and each.host["loading or saving"] == 4 * 2 * size
    assert zero.host["optimizer"] == 8 * size
    assert not ddp.fits and fsdp.fits and zero.fits


def test_ddp_has_the_buckets_of_its_first_and_second_step_at_a_time():
    words = [
        "--tokens_per_micro_batch",
        "128",
        "--model_max_length",
        "128",
    ]  # so few that the peak is where the gradients are
    one, two = (plan_of(OPEN_LLAMA_3B, *words, "--plan_world_size", ranks, step_tokens=128) for ranks in "12")
    assert two.gpu["gradients"] - one.gpu["gradients"] == 2 * 4 * one.shape.parameters


def test_gathered_weights_that_are_kept_lie_next_to_the_activations():
    words = ["--tokens_per_micro_batch", "4096", "--plan_world_size", "2", "--fsdp", "true"]
    again = plan_of(OPEN_LLAMA_7B, *words, "--bf16", "True", step_tokens=4096)
    kept = plan_of(
        OPEN_LLAMA_7B, *words, "--bf16", "True", "--fsdp_config", '{"reshard_after_forward": false}', step_tokens=4096
    )
    assert again.keeping_gathered().gpu == kept.gpu
    layer, head = 4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096, 32_000 * 4096
    more = kept.gpu_peak - again.gpu_peak
    assert more == pytest.approx(2 * (again.shape.parameters - 4 * layer - head), rel=1e-6)


def test_ligers_chunks_are_smaller_and_compiled_layers_do_not_use_them(installed):
    ask = (OPEN_LLAMA_3B, "--tokens_per_micro_batch", "16384")
    eager, compiled = (plan_of(*ask, *more, step_tokens=16_384) for more in ([], ["--compile_layers", "True"]))
    installed.add("liger_kernel")
    liger, same = (plan_of(*ask, *more, step_tokens=16_384) for more in ([], ["--compile_layers", "True"]))
    head = 32_000 * 3_200
    assert eager.gpu["head and loss"] == (4 + 2) * head + 19 * 2**27, "gradient, cast, a chunk's logits"
    # now the most is when backward begins: the head's gradient, scaled, and what the last layer works with
    work = (liger.gpu["head and loss"] - 2 * 4 * head) / 16_384
    assert work == pytest.approx(memory.WORK * (22 * 3200 + 8 * 8640 + 8 * 3200), rel=0.01)
    assert compiled.gpu == same.gpu


@pytest.mark.parametrize(("shape", "mib"), [(TINY_LLAMA_1B, 1.24), (OPEN_LLAMA_7B, 3.86)])
def test_with_ligers_norms_and_mlps_a_token_keeps_what_was_measured(installed, shape, mib):
    """One H200, torch 2.11, liger-kernel 0.8.5: benchmarks/LOG.md."""
    installed.add("liger_kernel")
    plan = plan_of(shape, "--bf16", "True", step_tokens=4096)
    assert plan.token_bytes / 2**20 == pytest.approx(mib, rel=0.04)
    assert (
        plan_of(shape, "--bf16", "True", "--plan_world_size", "2", step_tokens=4096).token_bytes
        > 1.5 * plan.token_bytes
    )


@pytest.mark.parametrize("size, block", [(1, 1), (4096, 4096), (4097, 8192)])
def test_page_locked_memory_comes_in_powers_of_two(size, block):
    assert memory._locked(size) == block


def test_zero_2_with_offload_keeps_a_float32_sum_of_the_gradients_on_the_gpu(tmp_path):
    words = ["--gradient_checkpointing", "True", "--deepspeed"]
    asked = ["--tokens_per_micro_batch", "4096"]
    step = {"step_tokens": 13_669}
    plan = plan_of(OPEN_LLAMA_3B, *words, str(ROOT / "ds_config.json"), *asked, **step)
    size, embedding, bucket = plan.shape.parameters, 32000 * 3200, 3200**2
    larger = 26 * 3 * 3200 * 8640 + 2 * embedding  # than the bucket: the feed-forward layers, the embedding, the head
    assert plan.gpu["weights"] == 2 * size and plan.gpu["optimizer"] == 0
    # sums, gradients that stay until the end, three buckets
    assert plan.gpu["gradients"] == 4 * size + 2 * larger + 2 * 3 * bucket
    assert plan.host["gradients"] == 2**34, "float32, page-locked: 12.8 GiB in a block of 16"
    stage3 = plan_of(OPEN_LLAMA_3B, *words, deepspeed_file(tmp_path, stage=3), *asked, **step)
    assert stage3.host["gradients"] == 2 * 2**34 and stage3.gpu_peak < plan.gpu_peak, "its sums lie in the host too"
    roomy = plan_of(OPEN_LLAMA_3B, *words, deepspeed_file(tmp_path, reduce_bucket_size=2e8), *asked, **step)
    assert roomy.gpu["gradients"] in (4 * size, 4 * size + 2 * 3 * 2e8), "none is larger"
    assert roomy.gpu_peak < plan.gpu_peak
    alone = plan_of(OPEN_LLAMA_3B, *words, str(ROOT / "ds_config.json"), "--tokens_per_micro_batch", "13669", **step)
    assert alone.gpu["gradients"] == plan.gpu["gradients"] - 2 * larger, "the last micro-batch drops them one by one"
    halves = plan_of(
        OPEN_LLAMA_3B,
        *words,
        str(ROOT / "ds_config.json"),
        "--tokens_per_micro_batch",
        "1024",
        "--plan_world_size",
        "2",
        **step,
    )
    split = plan.gpu["gradients"] - halves.gpu["gradients"]
    assert split == (4 * size + 2 * larger) / 2


def test_deepspeed_joins_the_weights_at_the_start_and_holds_them_twice(tmp_path):
    file = Path(deepspeed_file(tmp_path))
    file.write_text(json.dumps(json.loads(file.read_text()) | {"data_types": {}}))
    words = ["--deepspeed", str(file), "--gradient_checkpointing", "True"]
    few, many = (
        plan_of(OPEN_LLAMA_3B, *words, "--tokens_per_micro_batch", str(tokens), step_tokens=tokens)
        for tokens in (4_096, 65_536)
    )
    assert few.gpu_peak == 2 * 2 * few.shape.parameters, "16-bit weights as they were loaded, and joined"
    assert many.gpu_peak > few.gpu_peak and many.gpu["activations"] > 0, "here training takes more"


def note_gradients() -> None:
    """In a run: note the bytes that DeepSpeed holds when a backward pass is over, before it drops the gradients."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    drop = DeepSpeedZeroOptimizer._clear_param_grad_only

    def noted(self) -> None:
        held = [p.grad.untyped_storage() for group in self.bit16_groups for p in group if p.grad is not None]
        line = {
            "held": sum({storage.data_ptr(): storage.nbytes() for storage in held}.values()),
            "sums": sum(group.flat_partition.nbytes for group in self.averaged_gradients.values()),
        }
        with open(os.environ["NOTES"], "a") as file:
            print(json.dumps(line), file=file)
        drop(self)

    DeepSpeedZeroOptimizer._clear_param_grad_only = noted


@pytest.mark.slow
def test_deepspeed_holds_the_gradients_that_the_plan_counts(tiny_llama, questions_csv, tmp_path):
    pytest.importorskip("deepspeed")
    given = [*flags_for(tiny_llama, questions_csv, tmp_path), "--data_cache_dir", str(tmp_path / "cache")]
    given += ["--model_max_length", "64", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "8"]
    given += ["--max_steps", "1", "--save_strategy", "no", "--use_cpu", "True", "--bf16", "True"]
    given += ["--deepspeed", deepspeed_file(tmp_path, offload_optimizer={"device": "cpu"})]
    torchrun = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    jobs.run(given, 1, tmp_path / "log", note_gradients, **torchrun, NOTES=str(tmp_path / "notes"))
    *others, last = map(json.loads, (tmp_path / "notes").read_text().splitlines())
    config = LlamaConfig.from_pretrained(tiny_llama)
    shape = model_sizes.Shape(config)
    larger = 2 * 3 * 32 * 64 + 2 * 320 * 32  # than 32 x 32
    buckets = 2 * 2 * 32**2
    assert others and all(note == {"held": 2 * larger + buckets, "sums": 4 * shape.parameters} for note in others)
    assert last == others[0] | {"held": 0}
    words = ["--deepspeed", deepspeed_file(tmp_path)]
    several, one = (plan_of(config, *words, "--model_max_length", "64").at(1, count) for count in (2, 1))
    assert several.gpu["gradients"] - one.gpu["gradients"] == 2 * larger


@pytest.mark.parametrize(("stored", "words", "copied"), [
    (torch.bfloat16, ["--use_lora", "True"], 0),
    (torch.float16, ["--use_lora", "True"], 2),
    (None, ["--use_lora", "True"], 2),
    (torch.bfloat16, [], 4),
    (torch.float32, [], 2),  # what is saved
])  # fmt: skip
def test_weights_loaded_as_they_are_stored_take_no_host_memory(stored, words, copied):
    plan = plan_of(LlamaConfig(**OPEN_LLAMA_3B.to_dict() | {"dtype": stored}), *words)
    assert plan.host["loading or saving"] == copied * plan.shape.parameters


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").is_file(), reason="Linux counts it there")
def test_they_stay_in_the_file(tmp_path):
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **TINY | {"vocab_size": 64_000}, dtype=torch.bfloat16))
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    size = 2 * sum(p.numel() for p in model.parameters())

    def anonymous() -> int:
        return 1024 * int(re.search(r"Anonymous: +(\d+)", Path("/proc/self/smaps_rollup").read_text())[1])

    taken = {}
    for dtype in (torch.bfloat16, torch.float32):
        before = anonymous()
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        taken[dtype] = (anonymous() - before) / size
        assert loaded.dtype == dtype
    assert taken[torch.bfloat16] < 0.3 and taken[torch.float32] > 1.5, taken


def test_auto_grows_to_what_the_card_has_room_for():
    roomy = plan_of(OPEN_LLAMA_3B, step_tokens=2500)
    assert roomy.tokens == 2500, "a whole step"
    tight = plan_of(OPEN_LLAMA_3B, step_tokens=500_000)
    assert 2048 < tight.tokens < 10_000 and tight.fits
    room = 80 * GIB * (1 - memory.SPARE) - memory.OUTSIDE - tight.gpu_peak
    assert 0 <= room < 100 * tight.token_bytes


def test_a_micro_batch_is_never_larger_than_indices_of_32_bits_allow():
    plan = plan_of(OPEN_LLAMA_3B, "--plan_gpu_gib", "8000", step_tokens=500_000)
    assert plan.fits and plan.tokens == 62_500 <= memory.LARGEST_BUDGET, "eight of one size"


@pytest.mark.parametrize(
    ("limit", "found"), [("max\n", 1000), ("600\n", 600), ("9223372036854771712\n", 1000), (None, 1000)]
)
def test_a_container_may_have_less_memory_than_its_machine(limit, found, tmp_path, monkeypatch):
    if limit:
        (tmp_path / "memory.max").write_text(limit)
    monkeypatch.setattr(memory, "Path", lambda _: tmp_path / "memory.max")
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(total=1000))
    assert memory.host_memory() == found


def test_a_plan_fits_the_gpu_and_the_host_to_the_byte():
    plan = plan_of(OPEN_LLAMA_3B, "--tokens_per_micro_batch", "512")
    s, tokens = plan.setting, plan.tokens

    def fits(host: float = 0, gpu: float = 0) -> bool:
        s.host_there = plan.host_peak + host
        s.gpu_there = (plan.gpu_peak + gpu + memory.OUTSIDE) / (1 - memory.FRAGMENTS)
        return plan.at(tokens, 2 if plan.several else 1).fits

    assert fits() is fits(host=1, gpu=1) is True
    assert fits(host=-1) is fits(gpu=-64) is False


@pytest.mark.parametrize(
    ("optim", "bytes_each"),
    [
        ("adamw_torch_fused", 8),
        ("adamw_bnb_8bit", 2.03125),
        ("adamw_torch_8bit", 2.03125),
        ("sgd", 0),
        ("lion_32bit", 4),
    ],
)
def test_optimizer_states(optim, bytes_each):
    assert memory.optimizer_bytes(optim, 1000, 0) == bytes_each * 1000
    assert memory.optimizer_bytes("adamw_bnb_8bit", 1000, 100) == 2.03125 * 900 + 8 * 100


# ------------------------------------------------------------------------------------------------------ as a user


def test_a_plan_is_printed_for_the_micro_batches_that_run():
    plan = plan_of(OPEN_LLAMA_3B, "--tokens_per_micro_batch", "2048", step_tokens=16_384)
    other = plan.at(4000, micro_batches=1)
    assert "micro-batches of up to 4,000 tokens (a whole step in one)" in "\n".join(other.table())
    assert other.record()["tokens_per_micro_batch"] == 4000 and other.gpu["weights"] == plan.gpu["weights"]

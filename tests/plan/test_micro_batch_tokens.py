"""How far `--tokens_per_micro_batch auto` grows, on a GPU whose memory is told; tests on a GPU are in benchmarks/step_checks.py."""

import copy
import json
import os
import sys
from types import SimpleNamespace

import jobs
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from sft.flags import ModelArguments, TrainingArguments
from sft.model import loading
from sft.plan import micro_batch_tokens
from sft.step import attention
from sft.step.modules import exchange

MIB = 2**20
FLOOR, STEP, LAYERS = 2048, 30_000, 22
HEAD, LAYER = 0.25 * MIB, 0.05 * MIB  # bytes of a token outside the layers, and in each; 1.35 MiB in all
TINY = LlamaConfig(
    hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=LAYERS, vocab_size=300
)  # fmt: skip


def pretend(gpu: SimpleNamespace, monkeypatch) -> None:
    """Give torch.cuda the counters of a GPU that is not there."""
    fakes = {
        "mem_get_info": lambda device: (gpu.free, 80_000 * MIB),
        "memory_reserved": lambda device: gpu.reserved,
        "max_memory_allocated": lambda device: gpu.peak,
        "reset_peak_memory_stats": lambda device: None,
        "synchronize": lambda device: None,
        "empty_cache": lambda: None,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)


@pytest.fixture
def gpu(monkeypatch):
    """A GPU with `free` bytes, on which a run of some tokens leaves the peak that it must."""
    gpu = SimpleNamespace(free=80_000 * MIB, reserved=0, peak=0.0, full=False)
    pretend(gpu, monkeypatch)

    def run_once(probe, head, tokens, args) -> None:
        if gpu.full:
            raise torch.OutOfMemoryError("full")
        gpu.peak = 5_000 * MIB + tokens * (HEAD + probe.config.num_hidden_layers * LAYER)

    monkeypatch.setattr(micro_batch_tokens, "run_once", run_once)
    return gpu


def arguments(folder, **more) -> TrainingArguments:
    return TrainingArguments(output_dir=str(folder), use_cpu=True, bf16=True, **more)


def measure(folder, others=lambda tokens: 20_000 * MIB, **model_flags):
    given = copy.deepcopy(TINY)
    plan = SimpleNamespace(not_for_activations=others)
    model_args = ModelArguments(model_name_or_path="m", **model_flags)
    kernel = attention.PER_EXAMPLE
    found = micro_batch_tokens.measured_tokens(
        model_args, arguments(folder), given, kernel, FLOOR, STEP, exchange, plan
    )
    assert given.to_dict() == TINY.to_dict(), "the run's config must stay as it is"
    assert found.what == "tokens per micro-batch"
    return found.value, found.reason


def test_a_gpu_with_room_takes_the_whole_step(gpu, tmp_path):
    assert measure(tmp_path) == (STEP, "auto: a whole step; 1.35 MiB per token, room for 44,444")  # 60,000 / 1.35


@pytest.mark.parametrize("resident", [0, 13_000])
def test_a_smaller_gpu_takes_what_it_has_room_for_wherever_the_weights_are(gpu, tmp_path, resident):
    gpu.free, gpu.reserved = (41_600 - resident) * MIB, resident * MIB
    assert measure(tmp_path) == (16_000, "auto: 1.35 MiB per token, room for 16,000")  # 21,600 / 1.35


def test_gradients_lie_next_to_the_activations_where_a_step_takes_several_micro_batches(gpu, tmp_path):
    gpu.free = 57_800 * MIB  # the step just does not fit: 28,000 tokens; then 4,000 MiB of gradients are in the way
    found, _ = measure(tmp_path, others=lambda tokens: (20_000 if tokens >= STEP else 24_000) * MIB)
    assert found == 25_037  # 33,800 / 1.35


@pytest.mark.parametrize("free", [20_000, 22_000, 19_000])
def test_never_below_the_padded_runs_micro_batch(gpu, tmp_path, free):
    gpu.free = free * MIB
    assert measure(tmp_path) == (FLOOR, "per device x --model_max_length; no room was found for more")


def test_a_measurement_that_does_not_fit_ends_at_the_padded_runs_micro_batch(gpu, tmp_path):
    gpu.full = True
    assert measure(tmp_path)[0] == FLOOR


def test_no_part_of_a_token_is_negative(monkeypatch):
    """A second layer that takes more than the first, and all that lies around it."""
    gpu = SimpleNamespace(peak=0)
    pretend(SimpleNamespace(free=0, reserved=0, peak=0), monkeypatch)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: gpu.peak)

    def run_once(probe, head, tokens, args) -> None:
        gpu.peak = tokens * {1: 10, 2: 40}[probe.config.num_hidden_layers]

    monkeypatch.setattr(micro_batch_tokens, "run_once", run_once)
    args = SimpleNamespace(gradient_checkpointing=False, fsdp_config=None, device=None)
    probe = SimpleNamespace(config=SimpleNamespace(num_hidden_layers=0))
    assert micro_batch_tokens.activation_bytes(probe, None, args) == (0.0, 30.0)


@pytest.mark.parametrize("lora", [False, True])
def test_what_is_measured_computes_as_the_run_and_leaves_its_random_numbers_alone(lora, tmp_path, monkeypatch, capsys):
    """The path of a GPU on the CPU: a forward and a backward pass of one layer and of two, by the loss of packed rows."""
    seen, stock = [], micro_batch_tokens.run_once
    pretend(SimpleNamespace(free=80_000 * MIB, reserved=0, peak=0), monkeypatch)
    monkeypatch.setattr(micro_batch_tokens, "PROBES", (256, 512))

    def noted(probe, head, tokens, args):
        hooks = [weight.register_hook(lambda gradient: gradients.append(gradient)) for weight in trained(probe)]
        gradients: list[torch.Tensor] = []
        stock(probe, head, tokens, args)
        seen.append((probe.config.num_hidden_layers, tokens, len(gradients)))
        assert all(hook.remove() is None for hook in hooks) and not any(p.grad is not None for p in trained(probe))
        frozen = {p.dtype for p in probe.parameters() if not p.requires_grad}
        assert {p.dtype for p in trained(probe)} == {torch.float32} and frozen == ({torch.bfloat16} if lora else set())

    def trained(probe):
        return [p for p in probe.parameters() if p.requires_grad]

    monkeypatch.setattr(micro_batch_tokens, "run_once", noted)
    torch.manual_seed(3)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    measure(tmp_path, use_lora=lora, lora_r=2, lora_alpha=4, lora_dropout=0.0)
    assert torch.rand(1) == drawn
    assert capsys.readouterr().out == ""
    assert [run[:2] for run in seen] == [(1, 256), (1, 256), (1, 512), (2, 256), (2, 256), (2, 512)]
    of_a_layer = 14 if lora else 9  # two matrices for each of seven linear layers; or these and two norms
    assert seen[3][2] - seen[0][2] == of_a_layer and seen[0][2] > 0


def measure_as_on_a_gpu() -> None:
    """On one of two ranks over gloo, with ZeRO-3 announced: measure, print, and leave."""
    args = TrainingArguments(
        output_dir=os.environ["FOLDER"], use_cpu=True, bf16=True, deepspeed=os.environ["FOLDER"] + "/zero3.json"
    )
    loading.start_deepspeed(args)
    config = copy.deepcopy(TINY)
    config.num_hidden_layers = 2
    split = AutoModelForCausalLM.from_config(config)
    rank = torch.distributed.get_rank()
    gpu = SimpleNamespace(free=(50_000 - 10_000 * rank) * MIB, reserved=0, peak=0.0)
    pretend(gpu, SimpleNamespace(setattr=setattr))
    stock, dims = micro_batch_tokens.run_once, set()

    def noted(probe, head, tokens, args):
        stock(probe, head, tokens, args)
        dims.update(weight.dim() for name, weight in probe.named_parameters() if "norm" not in name)
        gpu.peak = tokens * (HEAD + probe.config.num_hidden_layers * LAYER)

    micro_batch_tokens.run_once, micro_batch_tokens.PROBES = noted, (256, 512)
    found = micro_batch_tokens.measured_tokens(
        ModelArguments(model_name_or_path="m"), args, TINY, attention.PER_EXAMPLE, FLOOR, STEP, exchange,
        SimpleNamespace(not_for_activations=lambda tokens: 20_000 * MIB),
    )  # fmt: skip
    line = {"split": split.get_input_embeddings().weight.numel(), "dims": sorted(dims), "found": found.value}
    print(json.dumps(line | {"ranks": args.world_size}), flush=True)
    sys.exit(0)


@pytest.mark.slow
def test_under_zero_3_whole_weights_are_measured_and_ranks_agree(tmp_path):
    pytest.importorskip("deepspeed")
    zero3 = {"zero_optimization": {"stage": 3}, "bf16": {"enabled": "auto"}, "train_micro_batch_size_per_gpu": "auto"}
    (tmp_path / "zero3.json").write_text(json.dumps(zero3))
    log = tmp_path / "log"
    jobs.run([], 2, log, measure_as_on_a_gpu, FOLDER=str(tmp_path))
    lines = [json.loads(line) for line in log.read_text().splitlines() if line.startswith('{"split"')]
    # a model that is made meanwhile has no weights of its own, and measuring it ended in "'weight' must be 2-D"
    assert lines == [{"split": 0, "dims": [2], "found": 14_814, "ranks": 2}] * 2  # 20,000 / 1.35, the smaller GPU's

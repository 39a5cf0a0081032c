"""Speed, MFU and memory: by hand, against torch's own counter, against a clock and against the system."""

import json
import time

import pytest
import torch
import transformers
from watched import flags_for

import utils
from sft.data.llama_tokenizer import load_llama_tokenizer
from sft.report import speed
from sft.report.speed import Meter, ModelFlops
from sft.run.trainer import SupervisedTrainer
from sft.step.counts import TokenCounts

# --------------------------------------------------------------------------------------------------------------- MFU


def llama(**changes):
    shape = {"vocab_size": 50, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**(shape | changes)))


# One layer: q and o 8x8, k and v 8x4, gate, up and down 8x12 = 64+64+32+32+3*96 = 480. Two layers: 960. Head: 8*50 = 400.
# Attention width: 2 layers x 2 heads x 4 = 16.


def test_flops_by_hand():
    flops = ModelFlops.of(llama())
    assert flops == ModelFlops(6 * 960, 6 * 400, 16)
    counts = TokenCounts(real=10, trained=4, computed=12, squared=52)
    assert flops.step(counts) == 6 * 960 * 10 + 6 * 400 * 4 + 6 * 16 * 52
    assert flops.step(counts, usual=True) == 6 * (960 + 400) * 10 + 12 * 16 * 52
    padded_more = TokenCounts(real=10, trained=4, computed=99, squared=52)
    assert flops.step(padded_more) == flops.step(counts)  # padding is not work
    counts.shared, counts.squared = 3, 43  # of 3 tokens that another example holds, neither
    assert flops.step(counts) == 6 * 960 * 7 + 6 * 400 * 4 + 6 * 16 * 43
    assert flops.step(counts, usual=True) == 6 * (960 + 400) * 7 + 12 * 16 * 43


def test_flops_of_frozen_weights_and_tied_embeddings():
    model = llama(tie_word_embeddings=True)
    for parameter in model.model.layers[0].parameters():
        parameter.requires_grad = False
    flops = ModelFlops.of(model)
    assert (flops.layers, flops.head) == (4 * 480 + 6 * 480, 6 * 400)
    counts = TokenCounts(real=10)
    assert flops.step(counts) == (4 * 960 + 2 * 480) * 10


def test_a_frozen_head_under_an_addition_is_the_head_still():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.LoraConfig(r=1, target_modules=["q_proj", "lm_head"]))
    flops = ModelFlops.of(model)
    additions = 2 * (8 + 8) + (8 + 50)  # of rank 1: on q in two layers, on the head
    assert (flops.layers, flops.head) == (4 * 960 + 6 * additions, 4 * 400)


def test_flops_agree_with_the_ones_that_torch_counts():
    """torch's own counter sees the full head and the whole square: the usual formula, one example at a time."""
    from torch.utils.flop_counter import FlopCounterMode

    model = llama(vocab_size=64, hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.arange(20)[None], labels=torch.arange(20)[None]).loss.backward()
    # eager computes the whole square; the Trainer's count of the backward pass is the same 2:1
    counted, formula = (
        counter.get_total_flops(),
        ModelFlops.of(model).step(TokenCounts(real=20, squared=400), usual=True),
    )
    assert abs(counted - formula) / formula < 0.02, (counted, formula)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA A10", 125),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA GeForce RTX 4090", 165),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA A1000", None),
    ],
)
def test_peaks(name, peak, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    assert speed.peak_tflops(torch.device("cuda"), torch.bfloat16) == peak
    assert speed.peak_tflops(torch.device("cuda"), torch.float32) is None
    assert speed.peak_tflops(torch.device("cpu"), torch.bfloat16) is None


# ------------------------------------------------------------------------------------------------------------- meter


def meter(**changes):
    arguments = {
        "flops": ModelFlops(6 * 960, 6 * 400, 16),
        "device": torch.device("cpu"),
        "peak": 312,
    }
    return Meter(**(arguments | changes))


def read(watch):
    """A reading in a job of one process."""
    return watch.read(torch.tensor([watch.own()], dtype=torch.float64))


def test_rates_against_a_clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    watch = meter()
    flops = watch.add_step(TokenCounts(real=100, trained=40, computed=125, squared=1000))  # the clock starts here
    assert flops == 6 * 960 * 100 + 6 * 400 * 40 + 6 * 16 * 1000
    now[0] += 2
    watch.add_step(TokenCounts(real=300, trained=60, computed=375, squared=3000))
    now[0] += 3
    control = transformers.TrainerControl(should_evaluate=True, should_save=True)
    watch.on_step_end(None, None, control)
    now[0] += 400
    watch.on_evaluate(None, None, control)
    now[0] += 600
    watch.on_save(None, None, control)
    numbers = read(watch)
    assert numbers["step_time_s"] == 2.5
    assert numbers["tokens_per_s_per_gpu"] == pytest.approx(400 / 5)
    assert numbers["trained_tokens_per_s_per_gpu"] == pytest.approx(100 / 5)
    assert numbers["padding_share"] == pytest.approx(0.2)
    by_hand = 6 * 960 * 400 + 6 * 400 * 100 + 6 * 16 * 4000
    assert numbers["mfu"] == pytest.approx(by_hand / 5 / 312e12)
    assert numbers["mfu_6n"] == pytest.approx((6 * 1360 * 400 + 12 * 16 * 4000) / 5 / 312e12)

    now[0] += 1
    watch.add_step(TokenCounts(real=50, trained=10, computed=50, squared=500))
    assert read(watch)["tokens_per_s_per_gpu"] == pytest.approx(50)  # since the last reading, not since the start
    assert watch.summary()["tokens_per_s_per_gpu"] == pytest.approx(450 / 6)
    assert watch.summary()["tokens"] == 450
    assert watch.summary()["model_flops"] == by_hand + 6 * 960 * 50 + 6 * 400 * 10 + 6 * 16 * 500
    assert watch.facts() == {"mfu_convention": speed.MFU_CONVENTION, "peak_tflops": 312}


@pytest.mark.parametrize("end", ["on_step_end", "on_epoch_end"])
@pytest.mark.parametrize("why", ["should_evaluate", "should_save", None])
def test_the_clock_stands_in_an_evaluation_and_in_a_save(monkeypatch, why, end):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    watch = meter()
    control = transformers.TrainerControl(**{why: True} if why else {})
    watch.add_step(TokenCounts(real=100))
    now[0] += 2
    getattr(watch, end)(None, None, control)
    now[0] += 400
    if why:
        (watch.on_evaluate if why == "should_evaluate" else watch.on_save)(None, None, control)
    watch.add_step(TokenCounts(real=100))
    now[0] += 2
    assert read(watch)["step_time_s"] == (2 if why else 202)


def test_rates_are_of_all_ranks(monkeypatch):
    """Rank 1 did three times the work and holds more memory: the mean per GPU, and the highest memory."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    watch = meter(peak=None)
    watch.add_step(TokenCounts(real=100, trained=40, computed=100, squared=1000))
    now[0] += 4
    *counts, _ = own = watch.own()
    numbers = watch.read(torch.tensor([own, [*(3 * count for count in counts), 77.0]], dtype=torch.float64))
    assert watch.total.real == 400 and "peak_tflops" not in watch.facts()
    assert numbers["tokens_per_s_per_gpu"] == 400 / 2 / 4
    assert numbers["peak_memory_gib"] == 77.0
    assert "mfu" not in numbers


def test_the_update_after_the_message_counts_in_the_peak(monkeypatch):
    watch = meter()
    watch.add_step(TokenCounts(real=1))
    for sent, now, peak in ((1.0, 5.0, 5.0), (7.0, 5.0, 7.0)):
        monkeypatch.setattr(speed, "peak_memory_gib", lambda device, now=now: now)
        numbers = watch.read(torch.tensor([[*[0.0] * 5, sent]], dtype=torch.float64))
        assert numbers["peak_memory_gib"] == peak


def test_memory_is_what_the_system_says():
    held = torch.ones(64 * 2**20)  # 256 MiB that are really touched
    with open("/proc/self/status") as status:
        high_water_kib = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    assert speed.peak_memory_gib(torch.device("cpu")) == pytest.approx(high_water_kib / 2**20, rel=0.02)
    assert held[-1] == 1


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the allocator is CUDA's")
def test_memory_is_what_the_allocator_says(tiny_llama, questions_csv, tmp_path, monkeypatch):
    """Half a GiB is taken and freed inside step 4: that line shows it, to the byte, and those before it do not."""
    ballast, steps, expected, reserved = 2**29, [], [], []
    step, read = SupervisedTrainer.training_step, Meter.read

    def step_with_ballast(self, *arguments):
        result = step(self, *arguments)
        steps.append(torch.cuda.memory_allocated())
        if len(steps) == 4:
            torch.empty(ballast, dtype=torch.uint8, device="cuda")
        return result

    def read_and_ask_the_allocator(self, every):
        numbers = read(self, every)
        expected.append(torch.cuda.memory_stats()["allocated_bytes.all.peak"] / 2**30)
        reserved.append(torch.cuda.memory_reserved() / 2**30)
        return numbers

    monkeypatch.setattr(SupervisedTrainer, "training_step", step_with_ballast)
    monkeypatch.setattr(Meter, "read", read_and_ask_the_allocator)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    flags = ("--bf16 True", "--per_device_train_batch_size 8", "--max_steps 6")
    utils.train(load_llama_tokenizer, flags_for(tiny_llama, questions_csv, tmp_path / "model", *flags))

    record = json.loads((tmp_path / "model" / "run_report.json").read_text())
    logged = [entry["peak_memory_gib"] for entry in record["log"]]
    assert len(steps) == len(logged) == 6
    assert logged == pytest.approx(expected[:6], rel=1e-9)
    assert logged[3:] == pytest.approx([(steps[3] + ballast) / 2**30] * 3, rel=1e-9)
    assert logged[2] < logged[3] - 0.4, "the ballast shows in step 4 and no sooner"
    assert steps[2] / 2**30 <= logged[2], "what a step holds is part of its peak"
    # allocated, not reserved: the freed half GiB stays with PyTorch, and with the driver's count
    free, there = torch.cuda.mem_get_info()
    assert logged[5] <= reserved[5] <= (there - free) / 2**30
    assert record["final"]["peak_memory_gib"] == pytest.approx(logged[5], rel=1e-9)


# --------------------------------------------------------------------------------------------------- speed, on a clock


@pytest.mark.slow
def test_tokens_per_second_against_a_stopwatch(tiny_llama, questions_csv, tmp_path, monkeypatch):
    """Steps of 60 ms; the stopwatch runs from the first micro-batch to the last one's end."""
    ends, step = [], SupervisedTrainer.training_step

    def slow_step(self, *arguments):
        ends.append(time.perf_counter())
        result = step(self, *arguments)
        time.sleep(0.06)
        ends.append(time.perf_counter())
        return result

    monkeypatch.setattr(SupervisedTrainer, "training_step", slow_step)
    flags = (
        "--per_device_train_batch_size 8 --learning_rate 1e-3 --save_strategy no --logging_steps 1 --num_train_epochs 2"
    )
    trainer = utils.train(
        load_llama_tokenizer, flags_for(tiny_llama, questions_csv, tmp_path / "model", *flags.split())
    )
    final = json.loads((tmp_path / "model" / "run_report.json").read_text())["final"]
    tokens = 2 * int(trainer.train_dataset.lengths.sum())
    assert final["tokens"] == tokens
    assert final["tokens_per_s_per_gpu"] == pytest.approx(tokens / (ends[-1] - ends[0]), rel=0.02)

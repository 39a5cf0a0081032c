"""What a person sees of a run: counting, MFU, the live line, the record, the picture, the card, the evaluation."""

import contextlib
import io
import json
import math
import re
import sys
import time
from types import SimpleNamespace

import pytest
import torch
import transformers

import utils
from sft import evaluation, throughput
from sft.record import FIELDS, REMOVED
from sft.throughput import Meter, ModelFlops, TokenCounts
from sft.tokenizers import load_llama_tokenizer

# ---------------------------------------------------------------------------------------------------------- counting


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
    padded_batch = throughput.CountingCollator(padded)(examples())
    packed_batch = throughput.CountingCollator(packed)(examples())
    assert padded_batch["counts"] == TokenCounts(real=8, trained=3, computed=10, squared=9 + 25)
    assert packed_batch["counts"] == TokenCounts(real=8, trained=3, computed=8, squared=9 + 25)
    assert throughput.take_counts([padded_batch, packed_batch]) == TokenCounts(16, 6, 18, 68)
    assert "counts" not in padded_batch and "counts" not in packed_batch  # the model must not see them


def test_a_label_on_the_first_token_is_not_trained():
    example = {"input_ids": torch.tensor([1, 2]), "labels": torch.tensor([1, 2])}  # nothing predicts a first token
    assert throughput.CountingCollator(packed)([example])["counts"].trained == 1


# --------------------------------------------------------------------------------------------------------------- MFU


def llama(**changes):
    shape = {"vocab_size": 50, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**(shape | changes)))


# One layer: q and o 8x8, k and v 8x4, gate, up and down 8x12 = 64+64+32+32+3*96 = 480. Two layers: 960. Head: 8*50 = 400.
# Attention width: 2 layers x 2 heads x 4 = 16.


def test_flops_by_hand():
    flops = ModelFlops.of(llama())
    assert flops == ModelFlops(960, 960, 400, 400, 16)
    counts = TokenCounts(real=10, trained=4, computed=12, squared=52)
    assert flops.step(counts) == 6 * 960 * 10 + 6 * 400 * 4 + 6 * 16 * 52
    assert flops.step_6n(counts) == 6 * (960 + 400) * 10 + 12 * 16 * 52
    padded_more = TokenCounts(real=10, trained=4, computed=99, squared=52)
    assert flops.step(padded_more) == flops.step(counts)  # padding is not work


def test_flops_of_frozen_weights_and_tied_embeddings():
    model = llama(tie_word_embeddings=True)
    for parameter in model.model.layers[0].parameters():
        parameter.requires_grad = False
    flops = ModelFlops.of(model)
    assert (flops.layer_weights, flops.trained_layer_weights, flops.head_weights) == (960, 480, 400)
    counts = TokenCounts(real=10)
    assert flops.step(counts) == (4 * 960 + 2 * 480) * 10


def test_flops_agree_with_the_ones_that_torch_counts():
    """torch's own counter sees the full head and the whole square: the formula of `step_6n`, one example at a time."""
    from torch.utils.flop_counter import FlopCounterMode

    model = llama(vocab_size=64, hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.arange(20)[None], labels=torch.arange(20)[None]).loss.backward()
    # eager computes the whole square; the Trainer's count of the backward pass is the same 2:1
    counted, formula = counter.get_total_flops(), ModelFlops.of(model).step_6n(TokenCounts(real=20, squared=400))
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
        ("cpu", None),
    ],
)
def test_peaks(name, peak):
    assert throughput.peak_tflops(name, torch.bfloat16) == peak
    assert throughput.peak_tflops(name, torch.float32) is None


# ------------------------------------------------------------------------------------------------------------- meter


def meter(**changes):
    arguments = {
        "flops": ModelFlops(960, 960, 400, 400, 16),
        "device": torch.device("cpu"),
        "device_name": "NVIDIA A100-SXM4-80GB",
        "compute_dtype": torch.bfloat16,
    }
    return Meter(**(arguments | changes))


def test_rates_against_a_clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    watch = meter()
    watch.add_step(TokenCounts(real=100, trained=40, computed=125, squared=1000))  # the clock starts here
    now[0] += 2
    watch.add_step(TokenCounts(real=300, trained=60, computed=375, squared=3000))
    now[0] += 3
    watch.pause()
    now[0] += 1000  # an evaluation and a save
    watch.resume()
    numbers = watch.read()
    assert numbers["step_time_s"] == 2.5
    assert numbers["tokens_per_s_per_gpu"] == pytest.approx(400 / 5)
    assert numbers["trained_tokens_per_s_per_gpu"] == pytest.approx(100 / 5)
    assert numbers["padding_share"] == pytest.approx(0.2)
    by_hand = 6 * 960 * 400 + 6 * 400 * 100 + 6 * 16 * 4000
    assert numbers["mfu"] == pytest.approx(by_hand / 5 / 312e12)
    assert numbers["mfu_6n"] == pytest.approx((6 * 1360 * 400 + 12 * 16 * 4000) / 5 / 312e12)

    now[0] += 1
    watch.add_step(TokenCounts(real=50, trained=10, computed=50, squared=500))
    assert watch.read()["tokens_per_s_per_gpu"] == pytest.approx(50)  # since the last reading, not since the start
    assert watch.summary()["tokens_per_s_per_gpu"] == pytest.approx(450 / 6)
    assert watch.summary()["tokens"] == 450


def test_rates_are_of_all_ranks():
    """Rank 1 did three times the work and holds more memory: the mean per GPU, and the highest memory."""

    def gather(own):
        other = own.clone()
        other[:4] *= 3
        other[4] = 77.0
        return torch.stack([own, other])

    watch = meter(gather=gather, device_name="an unknown device")
    watch.add_step(TokenCounts(real=100, trained=40, computed=100, squared=1000))
    time.sleep(0.05)
    numbers = watch.read()
    assert watch.total.real == 400
    assert 400 / 2 / 0.06 < numbers["tokens_per_s_per_gpu"] < 400 / 2 / 0.05
    assert numbers["peak_memory_gib"] == 77.0
    assert "mfu" not in numbers


def test_memory_is_what_the_system_says():
    held = torch.ones(64 * 2**20)  # 256 MiB that are really touched
    with open("/proc/self/status") as status:
        high_water_kib = next(int(line.split()[1]) for line in status if line.startswith("VmHWM"))
    assert throughput.peak_memory_gib(torch.device("cpu")) == pytest.approx(high_water_kib / 2**20, rel=0.02)
    assert held[-1] == 1


# ---------------------------------------------------------------------------------------------------- a run, watched

SECRET = "hf_ThisMustNotBeWrittenAnywhere"
RUN = "--eval_split 0.25 --eval_strategy steps --eval_steps 4 --eval_on_start True --eval_samples 2"
RUN += " --per_device_train_batch_size 2 --gradient_accumulation_steps 3 --per_device_eval_batch_size 3"
RUN += f" --learning_rate 1e-2 --save_strategy no --logging_steps 1 --num_train_epochs 1 --hub_token {SECRET}"
TEMPLATE = "Question: {instruction}\nAnswer:"


def flags_for(model, csv, output, *more):
    template = output.parent / "template.txt"
    template.write_text(TEMPLATE)
    return [
        "--model_name_or_path", str(model), "--data_path", str(csv), "--output_dir", str(output),
        "--data_cache_dir", str(output.parent / "cache"), "--prompt_template", str(template),
        "--model_max_length", "64", "--seed", "3", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def watched(tiny_llama, questions_csv, tmp_path_factory):
    """48 examples, 6 to a step: 8 steps, evaluated on 16 rows at steps 0, 4 and 8."""
    folder = tmp_path_factory.mktemp("watched") / "model"
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setenv("WANDB_API_KEY", "0123456789abcdef-a-key")
        patch.setattr(sys, "argv", ["llama_training.py", "--hub_token", SECRET, "--run_name", "0123456789abcdef-a-key"])
        trainer = utils.train(load_llama_tokenizer, flags_for(tiny_llama, questions_csv, folder, *RUN.split()))
    record = json.loads((folder / "run_report.json").read_text())
    return SimpleNamespace(trainer=trainer, folder=folder, printed=printed.getvalue(), record=record)


def paths(value, at=""):
    """{"a": {"b": 1}, "c": [{"d": 2}]} -> {"a.b", "c[].d"}"""
    if isinstance(value, dict) and value:
        return set().union(*(paths(item, f"{at}.{key}" if at else key) for key, item in value.items()))
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return set().union(*(paths(item, f"{at}[]") for item in value))
    return {at}


def documents(field, path):
    pattern = re.escape(field.removesuffix("?")).replace(r"\*", r"[^.]+")
    # what lies under `flags.*.*` and its like is of the user's making
    return re.fullmatch(pattern + (r"(\..*|\[\].*)?" if field.startswith(("flags", "evaluations")) else ""), path)


def test_every_field_is_documented_and_every_documented_field_is_there(watched):
    written = paths(watched.record)
    undocumented = [path for path in written if not any(documents(field, path) for field in FIELDS)]
    assert undocumented == []
    promised = [field for field in FIELDS if not field.endswith("?")]
    assert [field for field in promised if not any(documents(field, path) for path in written)] == []


def test_a_new_field_without_documentation_would_be_noticed():
    assert not any(documents(field, "log[].some_new_number") for field in FIELDS)
    assert any(documents(field, "log[].loss") for field in FIELDS)


def test_what_the_record_says_of_the_run(watched):
    record = watched.record
    assert record["status"] == "finished"
    assert record["batch"] == {
        "ranks": 1, "per_device": 2, "accumulation": 3, "examples_per_step": 6, "steps_per_epoch": 8, "steps": 8
    }  # fmt: skip
    assert [entry["step"] for entry in record["log"]] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [entry["step"] for entry in record["evaluations"]] == [0, 4, 8]
    assert record["template"]["text"] == TEMPLATE
    train = watched.trainer.train_dataset
    assert (record["data"]["train"]["kept"], record["data"]["eval"]["kept"]) == (48, 16)
    assert record["final"]["tokens"] == int(train.lengths.sum())
    assert record["final"]["trained_tokens"] == int((train.lengths - train.prompt_lengths).sum())
    shape = watched.trainer.model.config
    assert record["final"]["model_flops"] == by_hand(shape, train)
    assert {"data", "load", "train", "evaluate", "save", "report"} <= set(record["durations_s"])
    assert 0 < record["final"]["train_steps_s"] < record["durations_s"]["train"]


def by_hand(shape, dataset):
    """FLOPs of one pass over the rows of conftest's LLaMA: 2 layers, 32 wide, 64 in the MLP, 4 heads of 8, 2 key heads."""
    layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64
    real, trained = int(dataset.lengths.sum()), int((dataset.lengths - dataset.prompt_lengths).sum())
    squared = int((dataset.lengths.astype(int) ** 2).sum())
    return 6 * 2 * layer * real + 6 * 32 * shape.vocab_size * trained + 6 * 2 * 32 * squared


def test_no_secret_is_written(watched):
    for path in watched.folder.rglob("*"):
        if path.suffix in (".json", ".md", ".txt"):
            assert SECRET not in path.read_text() and "0123456789abcdef" not in path.read_text(), path
    assert watched.record["flags"]["training"]["hub_token"] == REMOVED
    assert watched.record["command"] == "python llama_training.py --hub_token '(removed)' --run_name '(removed)'" or (
        REMOVED in watched.record["command"]
    )
    assert watched.record["flags"]["training"]["average_tokens_across_devices"] is True  # not taken for a token


def test_the_printed_lines(watched):
    lines = watched.printed.splitlines()
    steps = [line for line in lines if line.startswith("step ")]
    assert len(steps) == 8
    assert re.fullmatch(
        r"step 1/8  loss \d\.\d{4}  lr 1\.00e-02  grad \d+\.\d\d  [\d,]+ tok/s/process \([\d,]+ trained\)  "
        r"padding \d+\.\d%  MFU peak unknown  mem \d+\.\d\d GiB  left \d+:\d\d",
        steps[0],
    ), steps[0]
    evaluations = [line for line in lines if line.startswith("evaluation at step")]
    assert [line.split(":")[0] for line in evaluations] == [f"evaluation at step {step}" for step in (0, 4, 8)]
    assert "(lowest so far)" in evaluations[1]
    assert not any("{'loss'" in line for line in lines)  # the Trainer's own printer is gone


# -------------------------------------------------------------------------------------------------------- evaluation


def mean_loss_of_rows(folder, dataset):
    """Row by row, with plain transformers and the whole logits: (mean over trained tokens, trained tokens)."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    total = tokens = 0
    for index in range(len(dataset)):
        ids, prompt = dataset[index]["input_ids"], int(dataset.prompt_lengths[index])
        with torch.no_grad():
            logits = model(ids[None]).logits[0]
        losses = torch.nn.functional.cross_entropy(logits[prompt - 1 : -1].double(), ids[prompt:], reduction="sum")
        total, tokens = total + float(losses), tokens + len(ids) - prompt
    return total / tokens, tokens


def test_the_evaluation_loss_is_the_mean_over_all_tokens(watched):
    last = watched.record["evaluations"][-1]
    loss, tokens = mean_loss_of_rows(watched.folder, watched.trainer.eval_dataset)
    assert last["eval_tokens"] == tokens
    assert last["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert last["eval_perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)


def test_evaluation_does_not_depend_on_the_batch_size_or_packing(watched):
    trainer, losses = watched.trainer, []
    for packed_rows, size in ((False, 1), (False, 5), (False, 16), (True, 1), (True, 3)):
        dataset = trainer.eval_dataset
        limit = {"max_tokens": 64 * size} if packed_rows else {"max_examples": size}
        sampler = evaluation.EvalBatchSampler(dataset.lengths, world_size=1, rank=0, **limit)
        if packed_rows != trainer.args.packing:
            continue
        loader = torch.utils.data.DataLoader(dataset, batch_sampler=sampler, collate_fn=trainer.data_collator)
        losses.append(evaluation.token_weighted_loop(trainer, loader, trainer.loss_sum).metrics["eval_loss"])
    assert len(losses) >= 2
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-6)
    # and it could: the mean of batch means, which the stock loop gives, is another number
    assert watched.record["evaluations"][-1]["eval_loss"] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("limit", [{"max_tokens": 10}, {"max_examples": 3}])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("lengths", [[3, 9, 4, 5], [50], [1] * 20, [7, 30, 2, 2, 2, 9, 10, 4]])
def test_every_evaluation_row_counts_once(lengths, world_size, limit):
    ranks = [evaluation.EvalBatchSampler(lengths, world_size, rank, **limit) for rank in range(world_size)]
    assert len({len(rank) for rank in ranks}) == 1  # a forward pass is collective under FSDP and ZeRO
    counted = [row for rank in ranks for batch in list(rank)[: rank.owned] for row in batch]
    assert sorted(counted) == list(range(len(lengths)))
    for batch in (batch for rank in ranks for batch in rank):
        assert len(batch) <= limit.get("max_examples", 99)
        assert len(batch) == 1 or sum(lengths[row] for row in batch) <= limit.get("max_tokens", 999)


def test_batches_as_drawn():
    ranks = [evaluation.EvalBatchSampler([3, 9, 4, 5], 2, rank, max_tokens=10) for rank in (0, 1)]
    assert [list(rank) for rank in ranks] == [[[1], [0]], [[3, 2], [3, 2]]]
    assert [rank.owned for rank in ranks] == [2, 1]


def test_answers_are_what_plain_transformers_generates(watched):
    samples = watched.record["samples"]
    assert [sample["step"] for sample in samples] == [0, 0, 4, 4, 8, 8]
    model = transformers.AutoModelForCausalLM.from_pretrained(watched.folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(watched.folder)
    for sample in samples[-2:]:
        assert sample["prompt"].startswith("Question: ") and sample["reference"].endswith(".")
        ids = tokenizer(sample["prompt"], return_tensors="pt").input_ids
        answer = model.generate(ids, max_new_tokens=evaluation.ANSWER_TOKENS, do_sample=False)[0, ids.shape[1] :]
        assert sample["answer"] == tokenizer.decode(answer, skip_special_tokens=True)


def test_the_best_model_is_exported_and_the_run_stops_early(tiny_llama, questions_csv, tmp_path):
    """A learning rate that first learns and then destroys."""
    flags = (
        "--eval_split 0.25 --eval_strategy steps --eval_steps 1 --save_strategy steps --save_steps 1 --eval_samples 0"
    )
    flags += " --early_stopping_patience 2 --load_best_model_at_end True --learning_rate 0.2 --num_train_epochs 3"
    trainer = utils.train(
        load_llama_tokenizer, flags_for(tiny_llama, questions_csv, tmp_path / "model", *flags.split())
    )
    record = json.loads((tmp_path / "model" / "run_report.json").read_text())
    losses = [entry["eval_loss"] for entry in record["evaluations"]]
    assert record["status"] == "stopped" and len(losses) < 18
    assert losses.index(min(losses)) == len(losses) - 3  # two evaluations in a row were no better
    assert record["final"]["best_step"] == record["evaluations"][-3]["step"]
    loss, _ = mean_loss_of_rows(tmp_path / "model", trainer.eval_dataset)
    assert loss == pytest.approx(min(losses), rel=1e-5)


def evaluation_flags(**changes):
    flags = {"eval_data_path": None, "eval_split": 0.0, "eval_strategy": "no", "early_stopping_patience": 0}
    flags |= {"load_best_model_at_end": False, "eval_samples": 4}
    return SimpleNamespace(**(flags | changes))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"eval_strategy": "steps"}, "--eval_strategy steps: there are no rows to evaluate. Add --eval_data_path"),
        ({"eval_split": 0.1}, "--eval_split is given and --eval_strategy is no: the rows would never be used."),
        ({"eval_data_path": "a.csv"}, "--eval_data_path is given and --eval_strategy is no"),
        ({"early_stopping_patience": 2}, "--early_stopping_patience compares evaluations: add --eval_strategy epoch"),
        ({"load_best_model_at_end": True}, "--load_best_model_at_end compares evaluations"),
        ({"eval_samples": -1}, "--eval_samples -1: it cannot be negative"),
    ],
)
def test_contradictions_of_the_evaluation_flags(flags, message):
    (problem,) = evaluation.problems(evaluation_flags(**flags))
    assert problem.startswith(message)


def test_flags_without_contradiction():
    assert evaluation.problems(evaluation_flags()) == []
    assert evaluation.problems(evaluation_flags(eval_split=0.1, eval_strategy="epoch", early_stopping_patience=2)) == []


# --------------------------------------------------------------------------------------------------- speed, on a clock


def test_tokens_per_second_against_a_stopwatch(tiny_llama, questions_csv, tmp_path, monkeypatch):
    """Steps of 60 ms; the stopwatch runs from the first micro-batch to the last one's end."""
    ends, step = [], utils.SupervisedTrainer.training_step

    def slow_step(self, *arguments):
        ends.append(time.perf_counter())
        result = step(self, *arguments)
        time.sleep(0.06)
        ends.append(time.perf_counter())
        return result

    monkeypatch.setattr(utils.SupervisedTrainer, "training_step", slow_step)
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


def test_a_line_costs_little(watched):
    """At each logged step the line, the record and the picture, measured by the report itself: under 0.5 % of 100 ms steps."""
    lines = len(watched.record["log"]) + len(watched.record["evaluations"]) + 1
    assert watched.record["durations_s"]["report"] / lines < 0.005 * 0.1

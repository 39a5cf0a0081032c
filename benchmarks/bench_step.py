r"""Tokens per second of the training step: this project, its padded ancestor and TRL's SFTTrainer, side by side.

    python benchmarks/bench_step.py                                       # on a GPU: every scenario, checks first
    python benchmarks/bench_step.py --scenarios cpu                       # a tiny model on the CPU
    python benchmarks/bench_step.py --scenarios original --variants ancestor,ours --output results.jsonl
    python benchmarks/bench_step.py --data_path my.csv --tokenizer my_model_folder    # the lengths of your rows

Every variant takes the same number of examples (or, where examples are packed into rows, of tokens) in each optimizer step,
runs in a process of its own, and goes through its own Trainer as a user's run does: `ours` and `ancestor` through
`utils.SupervisedTrainer`, with `ancestor` adding --packing False; `trl_*` through `trl.SFTTrainer`. Weights are random (speed
does not depend on them) and so are the token ids; the lengths are those of 9,310 real instruction rows. TRL is measured
where benchmarks/requirements.txt is installed.
"""

import argparse
import contextlib
import csv
import dataclasses
import gc
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking whether there is a GPU must not open it: we fork
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
import transformers
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

import utils
from sft import attention
from sft.arguments import parse
from sft.record import Report
from sft.stops import Stops
from sft.throughput import ModelFlops, TokenCounts, peak_tflops
from sft.tokenizers import load_llama_tokenizer

LENGTHS = Path(__file__).with_name("instruction_lengths.csv")
IGNORE_INDEX = -100

SHAPES: dict[str, dict[str, Any]] = {
    "1.1B": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_key_value_heads": 4},
    "7B-shaped, 8 layers": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 8},
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 512,
    },
    "check": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 2, "num_key_value_heads": 4},
    "check, heads of 100": {"hidden_size": 3200, "intermediate_size": 8640, "num_hidden_layers": 2},
}


@dataclasses.dataclass(frozen=True)
class Scenario:
    """A model and a recipe. Steps are (warm-up, measured).

    The warm-up compiles, and loads most of cuBLAS's kernels: it takes another one for another length of row, and the first use of
    each stops the GPU.
    """

    shape: str
    per_device: int
    accumulation: int
    max_length: int
    variants: tuple[str, ...]
    steps: tuple[int, int]
    slow_steps: tuple[int, int]  # of variants that take seconds for one step

    @property
    def examples(self) -> int:
        return self.per_device * self.accumulation


GPU_VARIANTS = ("ancestor", "trl_default", "trl_best", "trl_best_whole", "ours")
SCENARIOS = {
    # the original's command: --per_device_train_batch_size 2 --gradient_accumulation_steps 8 --model_max_length 1024
    "original": Scenario("1.1B", 2, 8, 1024, GPU_VARIANTS, (30, 60), (1, 4)),
    "large": Scenario("1.1B", 16, 8, 1024, GPU_VARIANTS, (10, 30), (1, 3)),
    "7b": Scenario("7B-shaped, 8 layers", 16, 8, 1024, GPU_VARIANTS, (6, 16), (1, 2)),
    "cpu": Scenario("tiny", 2, 8, 128, ("ancestor", "ours"), (2, 20), (2, 20)),
}
SLOW = ("ancestor", "trl_default")
WHAT = {
    "ancestor": "padded, stock attention and loss (--packing False)",
    "ours": "this project's defaults",
    "trl_default": "SFTTrainer's defaults: padded, gradient checkpointing",
    "trl_best": "SFTTrainer: packed rows, Liger, no checkpointing, our attention kernel; 2 rows x 3 micro-batches",
    "trl_best_whole": "the same, the whole step in one micro-batch",
}


# ---------------------------------------------------------------------------------------------------------------- rows


def read_lengths(path: Path) -> np.ndarray:
    """(examples, 2): prompt tokens, and tokens in all with the response and EOS."""
    with open(path, newline="", encoding="utf-8") as file:
        next(rows := csv.reader(file))
        return np.array([[int(cell) for cell in row] for row in rows])


def lengths_of(data_path: str, tokenizer: str, source: str, target: str) -> np.ndarray:
    """The same of a CSV, by the project's own data path."""
    flags = ["--model_name_or_path", tokenizer, "--data_path", data_path, "--source", source, "--target", target]
    model_args, data_args, training_args = parse([*flags, "--output_dir", tempfile.mkdtemp()])
    loaded = load_llama_tokenizer(model_args, training_args)
    dataset = utils.make_supervised_data_module(loaded, data_args, training_args)["train_dataset"]
    return np.stack([dataset.prompt_lengths, dataset.lengths], axis=1)


class RandomRows(Dataset):
    """Rows of random ids with given lengths; the prompt's labels are masked. What `utils.SupervisedDataset` gives."""

    def __init__(self, lengths: np.ndarray, max_length: int, vocabulary: int):
        lengths = lengths[lengths[:, 0] < max_length]  # as the data path: a prompt that leaves no room is dropped
        random = np.random.default_rng(0)
        order = random.permutation(len(lengths))  # sources lie in the file one after another
        self.prompt_lengths = lengths[order, 0].astype(np.int32)
        self.lengths = np.minimum(lengths[order, 1], max_length).astype(np.int32)
        self.ends = np.cumsum(self.lengths, dtype=np.int64)
        self.tokens = random.integers(3, vocabulary, self.ends[-1], dtype=np.uint16)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        end = self.ends[index]
        input_ids = torch.from_numpy(self.tokens[end - self.lengths[index] : end].astype(np.int64))
        labels = input_ids.clone()
        labels[: self.prompt_lengths[index]] = IGNORE_INDEX
        return {"input_ids": input_ids, "labels": labels}


# ------------------------------------------------------------------------------------------------------------ trainers


def make_model(shape: str, device: torch.device, kernel: str | None) -> LlamaForCausalLM:
    """Random float32 weights, the same ones each time."""
    config = LlamaConfig(
        **{"num_attention_heads": 32, "vocab_size": 32000, "max_position_embeddings": 2048} | SHAPES[shape]
    )
    config.use_cache, config.pad_token_id = False, 0
    config._attn_implementation = kernel or "sdpa"
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(config)


def our_trainer(
    scenario: Scenario, rows: RandomRows, device: torch.device, extra: list[str]
) -> utils.SupervisedTrainer:
    """The Trainer of a run with the original command's flags, as `utils.train` sets it up."""
    folder = tempfile.mkdtemp()
    shape = make_model(scenario.shape, torch.device("meta"), None).config
    shape.save_pretrained(folder)
    flags = (
        f"--model_name_or_path {folder} --data_path random --learning_rate 2e-5 --weight_decay 0. --warmup_ratio 0.05 "
    )
    flags += "--lr_scheduler_type cosine --logging_steps 1 --save_strategy no --max_steps 6000 "
    flags += f"--model_max_length {scenario.max_length} --per_device_train_batch_size {scenario.per_device} "
    flags += f"--gradient_accumulation_steps {scenario.accumulation} --output_dir {tempfile.mkdtemp()}"
    bf16 = ["--bf16", str(device.type == "cuda")]
    model_args, data_args, training_args = parse([*flags.split(), *bf16, *extra])
    kernel = None
    if training_args.packing:
        model_args.model_name_or_path = folder
        utils.choose_attention(model_args, training_args)
        kernel = model_args.attn_implementation
    memory_plan = utils.plan_memory(model_args, training_args, rows.lengths)
    trainer = utils.SupervisedTrainer(
        model=make_model(scenario.shape, device, kernel),
        args=training_args,
        train_dataset=rows,
        data_collator=utils.DataCollatorForSupervisedDataset(any_tokenizer()),
    )
    trainer.memory_plan = memory_plan
    trainer.stops = Stops()
    trainer.add_callback(trainer.stops)
    utils.watch(trainer, Report(model_args, data_args, training_args, lambda *_: None))
    return trainer


def any_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Trainers want one; it tokenizes nothing here."""
    from tokenizers import Tokenizer, models

    words = {"<unk>": 0, "<s>": 1, "</s>": 2}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, "<unk>")),
        pad_token="<unk>",
        eos_token="</s>",
        bos_token="<s>",
    )


def trl_trainer(variant: str, scenario: Scenario, rows: RandomRows, device: torch.device) -> transformers.Trainer:
    """TRL's SFTTrainer on the same rows."""
    from datasets import Dataset as Table
    from datasets import disable_progress_bars
    from trl import SFTConfig, SFTTrainer

    disable_progress_bars()
    count = min(len(rows), scenario.examples * (sum(scenario.steps) + 4))  # no epoch ends among the measured steps
    examples = [rows[index] for index in range(count)]
    table = Table.from_dict(
        {name: [example[name].tolist() for example in examples] for name in ("input_ids", "labels")}
    )
    options: dict[str, Any] = {
        "per_device_train_batch_size": scenario.per_device,
        "gradient_accumulation_steps": scenario.accumulation,
        "max_length": scenario.max_length,
    }
    kernel = None
    if variant != "trl_default":
        tokens = int(rows.lengths.mean() * scenario.examples)  # of one optimizer step
        per_device, accumulation = (2, 3) if variant == "trl_best" and scenario.examples > 16 else (1, 1)
        whole = 6 if variant == "trl_best_whole" and scenario.examples > 16 else 1
        options = {
            "per_device_train_batch_size": per_device * whole,
            "gradient_accumulation_steps": accumulation,
            "max_length": max(tokens // (per_device * accumulation * whole), int(rows.lengths.max())),
            "packing": True,
            "use_liger_kernel": device.type == "cuda",
            "gradient_checkpointing": False,
        }
        kernel = attention.PER_EXAMPLE
        if device.type == "cuda":
            from sft import triton_attention  # noqa: F401  registers its operator

            kernel = attention.TRITON
    config = SFTConfig(
        output_dir=tempfile.mkdtemp(), max_steps=6000, learning_rate=2e-5, lr_scheduler_type="cosine", save_strategy="no", logging_steps=1,
        report_to="none", bf16=device.type == "cuda", use_cpu=device.type == "cpu", **options,
    )  # fmt: skip
    model = make_model(scenario.shape, device, kernel)
    return SFTTrainer(model=model, args=config, train_dataset=table, processing_class=any_tokenizer())


# ----------------------------------------------------------------------------------------------------------- measuring


class Clock(transformers.TrainerCallback):
    """Times the measured steps and ends the run after them."""

    def __init__(self, warm_up: int, steps: int, device: torch.device):
        self.warm_up, self.steps, self.device = warm_up, steps, device
        self.seconds = self.began = self.first = 0.0
        self.batches: list[dict] = []  # of the measured steps; counted afterwards, when it costs no time

    def watch(self, trainer: transformers.Trainer) -> "Clock":
        stock = trainer.get_batch_samples

        def get_batch_samples(*args: Any) -> Any:
            found = stock(*args)
            if self.warm_up <= trainer.state.global_step < self.warm_up + self.steps:
                names = ("labels", "attention_mask", "cu_seq_lens_q")
                self.batches += [{name: batch[name] for name in names if name in batch} for batch in found[0]]
            return found

        trainer.get_batch_samples = get_batch_samples  # type: ignore[method-assign, assignment]
        trainer.add_callback(self)
        return self

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.first = self.now()
        if state.global_step == self.warm_up:
            self.began = self.now()
        if state.global_step == self.warm_up + self.steps:
            self.seconds = self.now() - self.began
            control.should_training_stop = True

    def counts(self) -> TokenCounts:
        """What the measured steps held."""
        total = TokenCounts()
        for batch in self.batches:
            labels = batch["labels"]
            if "attention_mask" in batch:
                lengths = batch["attention_mask"].sum(dim=1)
            else:
                lengths = batch["cu_seq_lens_q"].diff()
            total += TokenCounts(
                real=int(lengths.sum()),
                trained=int((labels[:, 1:] != IGNORE_INDEX).sum()),
                computed=labels.numel(),
                squared=int((lengths.long() ** 2).sum()),
            )
        return total


def measure(variant: str, scenario_name: str, lengths: np.ndarray, profile: str | None) -> dict[str, Any]:
    """Run one variant; what it did per second."""
    scenario, device = SCENARIOS[scenario_name], the_device(scenario_name)
    rows = RandomRows(lengths, scenario.max_length, SHAPES[scenario.shape].get("vocab_size", 32000))
    if variant in ("ancestor", "ours"):
        extra = ["--packing", "False"] if variant == "ancestor" else []
        trainer: transformers.Trainer = our_trainer(scenario, rows, device, extra)
    else:
        trainer = trl_trainer(variant, scenario, rows, device)
    clock = Clock(*(scenario.slow_steps if variant in SLOW else scenario.steps), device).watch(trainer)
    flops = ModelFlops.of(trainer.model)  # type: ignore[arg-type]
    began = clock.now()
    with profiled(profile, trainer, clock):
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if not all(np.isfinite(losses)):
        raise ArithmeticError(f"a loss is not a number: {losses}")
    counts = clock.counts()
    plan = getattr(trainer, "memory_plan", None)  # TRL's trainers have none
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    peak = peak_tflops(name, torch.bfloat16) if device.type == "cuda" else None
    tflops, tflops_6n = (count(counts) / clock.seconds / 1e12 for count in (flops.step, flops.step_6n))
    return {
        "scenario": scenario_name,
        "variant": variant,
        "model": scenario.shape,
        "examples_per_step": scenario.examples,
        "tokens_per_step": counts.real / clock.steps,
        "step_s": clock.seconds / clock.steps,
        "tokens_per_s": counts.real / clock.seconds,
        "trained_tokens_per_s": counts.trained / clock.seconds,
        "padding_share": 1 - counts.real / counts.computed,
        "tflops": tflops,
        "tflops_6n": tflops_6n,
        "mfu": tflops / peak if peak else None,
        "mfu_6n": tflops_6n / peak if peak else None,
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
        "forecast_memory_gib": plan.gpu_peak / 2**30 if plan and device.type == "cuda" else None,
        "first_step_s": clock.first
        - began,  # from the start of train(): the budget's trials, compiling, the step itself
        "steps": clock.steps,
        "device": name,
    }


@contextlib.contextmanager
def profiled(path: str | None, trainer: transformers.Trainer, clock: Clock):
    """Write what the kernels of two steps after the measured ones took to a file. Their time is not counted."""
    if path is None:
        yield
        return
    first = clock.warm_up + clock.steps
    profiler = torch.profiler.profile(activities=list(torch.profiler.supported_activities()))

    class Window(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step >= first + 2
            if state.global_step == first:
                profiler.start()
            if state.global_step == first + 2:
                clock.now()
                profiler.stop()

    trainer.add_callback(Window())
    yield
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_device_time_total)
    on_gpu = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    kernels = [event for event in on_gpu if not event.is_user_annotation]
    busy = sum(event.self_device_time_total for event in kernels) or 1.0
    with open(path, "w", encoding="utf-8") as file:
        file.write(f"two steps; GPU busy {busy / 2e3:.1f} ms per step\n")
        for event in kernels[:60]:
            share = event.self_device_time_total / busy
            file.write(
                f"{event.self_device_time_total / 2e3:8.2f} ms {share:6.1%} {event.count // 2:5d} x {event.key[:120]}\n"
            )
        file.write(
            "\n" + profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=30, max_name_column_width=60)
        )
    profiler.export_chrome_trace(str(Path(path).with_suffix(".trace.json.gz")))


def matmul_ceiling(seconds: float = 1.5) -> float:
    """TFLOP/s of an 8192 x 8192 x 8192 bf16 product on random data."""
    size = 8192
    left, right = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    rates = []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(10):
            left @ right
        end.record()
        end.synchronize()
        rates.append(10 * 2 * size**3 / start.elapsed_time(end) / 1e9)
    return statistics.median(rates)


# -------------------------------------------------------------------------------------------------------------- checks


def check_gradients(lengths: np.ndarray, device: torch.device) -> list[str]:
    """The gradients of one optimizer step, through the Trainer: packed in bf16 against padded in float32, ||a - b|| / ||b||.

    Raises ArithmeticError where packed is worse than padded bf16 by more than a quarter, where anything is not a number, or
    where a batch whose examples see each other passes too.
    """
    said = []
    packed = {
        "packed": ["--compile_layers", "False"],
        "packed, small micro-batches": ["--compile_layers", "False", "--tokens_per_micro_batch", "1024"],
        "packed, compiled": ["--compile_layers", "True"],
        "examples see each other": ["--compile_layers", "False"],
    }
    for shape in ("check", "check, heads of 100") if device.type == "cuda" else ("tiny",):
        scenario = Scenario(shape, 4, 4, 1024, (), (0, 1), (0, 1))
        rows = RandomRows(lengths, scenario.max_length, SHAPES[shape].get("vocab_size", 32000))
        reference = gradients_of(scenario, rows, device, ["--packing", "False", "--bf16", "False"])
        padded = relative_error(
            gradients_of(scenario, rows, device, ["--packing", "False", "--bf16", "True"]), reference
        )
        said.append(f"gradients, {shape}: padded bf16 against padded float32: {padded:.2e}")
        for way, flags in packed.items():
            leak = way == "examples see each other"
            found = gradients_of(scenario, rows, device, ["--bf16", "True", *flags], leak)
            error = relative_error(found, reference)
            said.append(f"gradients, {shape}: {way}, bf16 against padded float32: {error:.2e}")
            good = error > 5 * padded if leak else error <= 1.25 * padded  # NaN is neither
            if not good:
                raise ArithmeticError("\n".join(said))
    return said


# Holds all of the card but so many bytes until its input ends.
HOLD = """
import sys, torch
torch.empty(0, device="cuda")
taken = torch.empty(torch.cuda.mem_get_info()[0] - int(sys.argv[1]), dtype=torch.uint8, device="cuda")
print("held", flush=True)
sys.stdin.read()
"""


def check_budget(lengths: np.ndarray, free_gib: float) -> list[str]:
    """On a card with this much memory left, --tokens_per_micro_batch auto runs where padded runs.

    Another process takes the rest: what this one's allocator holds would count as room. Raises torch.OutOfMemoryError where it does not.
    """
    device, said = torch.device("cuda"), []
    scenario = Scenario("1.1B", 2, 16, 1024, (), (0, 2), (0, 2))
    rows = RandomRows(lengths, scenario.max_length, 32000)
    command = [sys.executable, "-c", HOLD, str(int(free_gib * 2**30))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        if holder.stdout.readline() != "held\n":
            raise RuntimeError(f"no process could take the card's memory but {free_gib} GiB")
        for way, flags in {"padded": ["--packing", "False"], "packed": ["--compile_layers", "False"]}.items():
            trainer = our_trainer(scenario, rows, device, flags)
            Clock(0, 2, device).watch(trainer)
            torch.cuda.reset_peak_memory_stats()
            trainer.train()
            peak = torch.cuda.max_memory_allocated() / 2**30
            said.append(f"{free_gib:.0f} GiB free, {way}: peak {peak:.1f} GiB")
            if trainer.packing_plan:
                said[-1] += f"; {trainer.packing_plan}"
            del trainer
            gc.collect()
            torch.cuda.empty_cache()
    return said


def gradients_of(scenario, rows, device, flags: list[str], leak: bool = False) -> dict[str, torch.Tensor]:
    """Every parameter's gradient just before the first optimizer step."""
    found: dict[str, torch.Tensor] = {}

    class Catch(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            found.update({name: weight.grad.float().clone() for name, weight in model.named_parameters()})
            control.should_training_stop = True

    trainer = our_trainer(scenario, rows, device, ["--max_grad_norm", "0", *flags])
    trainer.add_callback(Catch())
    if leak:
        collate = trainer.data_collator

        def leaking(examples: list[dict]) -> dict:
            batch = collate(examples)
            whole = torch.tensor([0, batch["input_ids"].numel()], dtype=torch.int32)
            return (
                batch
                | {"cu_seq_lens_q": whole, "cu_seq_lens_k": whole}
                | dict.fromkeys(("max_length_q", "max_length_k"), int(whole[1]))
            )

        trainer.data_collator = leaking
    trainer.train()
    del trainer
    gc.collect()
    return found


def relative_error(found: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> float:
    """||a - b|| / ||b|| over all parameters together."""
    assert found.keys() == reference.keys()
    difference = sum((found[name] - reference[name]).double().square().sum() for name in reference)
    size = sum(reference[name].double().square().sum() for name in reference)
    return float((difference / size) ** 0.5)


# ---------------------------------------------------------------------------------------------------------------- main


def the_device(scenario_name: str) -> torch.device:
    return torch.device("cpu" if scenario_name == "cpu" else "cuda")


def _child(pipe: Any, function: Callable, arguments: tuple) -> None:
    try:
        pipe.send((True, function(*arguments)))
    except BaseException:  # told to the parent, which says it and ends with a failure
        pipe.send((False, traceback.format_exc()))


def alone(function: Callable, *arguments: Any) -> Any:
    """Call a function in a fresh process: its memory is its own, and its failure too. Libraries are loaded once, here."""
    context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_child, args=(theirs, function, arguments))
    child.start()
    theirs.close()
    try:
        good, answer = ours.recv()
    except EOFError:
        good, answer = False, "the process died"
    child.join()
    if not good:
        raise RuntimeError(answer)
    return answer


def add_ratios(results: list[dict], ceiling: float | None) -> None:
    """Compare the variants of one scenario: with the ancestor, and with the better of TRL's."""
    rates = {result["variant"]: result["tokens_per_s"] for result in results}
    trl_best = max((rate for variant, rate in rates.items() if variant.startswith("trl_best")), default=None)
    for result in results:
        result["matmul_ceiling_tflops"] = ceiling
        result["ceiling_share"] = result["tflops"] / ceiling if ceiling else None
        result["ceiling_share_6n"] = result["tflops_6n"] / ceiling if ceiling else None
        result["ratio_to_ancestor"] = result["tokens_per_s"] / rates["ancestor"] if "ancestor" in rates else None
        result["ratio_to_trl"] = result["tokens_per_s"] / trl_best if trl_best else None


def table(results: list[dict]) -> str:
    """The results for a reader."""

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    lines = [
        "| scenario | variant | examples/step | tokens/s | x ancestor | x TRL | TFLOP/s (6N) | of ceiling (6N) | peak GiB |"
    ]
    lines += ["|---" * 9 + "|"]
    for result in results:
        share, share_6n = number(result["ceiling_share"], ".0%"), number(result["ceiling_share_6n"], ".0%")
        cells = [
            result["scenario"],
            result["variant"],
            str(result["examples_per_step"]),
            format(result["tokens_per_s"], ",.0f"),
            number(result["ratio_to_ancestor"], ".2f"),
            number(result["ratio_to_trl"], ".2f"),
            f"{result['tflops']:.0f} ({result['tflops_6n']:.0f})" if result["tflops"] > 1 else "-",
            f"{share} ({share_6n})",
            number(result["peak_memory_gib"], ".1f"),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def stack() -> dict[str, str]:
    """What the numbers belong to."""
    from importlib import metadata

    versions = {}
    for package in ("torch", "transformers", "accelerate", "trl", "liger-kernel"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=LENGTHS.parent)
    return {
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python", *sys.argv]),
        "commit": commit.stdout.strip(),
        "python": platform.python_version(),
        **versions,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenarios", help=f"of {', '.join(SCENARIOS)}; default: all that this machine can run")
    parser.add_argument("--variants", help=f"of {', '.join(WHAT)}; default: all that are installed")
    parser.add_argument(
        "--checks", choices=("first", "only", "no"), default="first", help="the gradients; on a GPU the memory too"
    )
    parser.add_argument(
        "--repeat", type=int, help="runs of each variant, taken in turn; the median counts. Default 1, on a CPU 5"
    )
    parser.add_argument("--data_path", help="a CSV whose lengths are used")
    parser.add_argument(
        "--tokenizer", help="the model folder or repository whose tokenizer gives --data_path its lengths"
    )
    parser.add_argument("--source", default="prompt")
    parser.add_argument("--target", default="response")
    parser.add_argument("--profile", help="a folder for the kernels of `ours`, one file for each scenario")
    parser.add_argument("--output", help="a file for the JSON lines too")
    flags = parser.parse_args()
    cuda = torch.cuda.is_available()
    if flags.data_path:
        if not flags.tokenizer:
            parser.error("--data_path needs --tokenizer")
        lengths = alone(lengths_of, flags.data_path, flags.tokenizer, flags.source, flags.target)
    else:
        lengths = read_lengths(LENGTHS)
    scenarios = flags.scenarios.split(",") if flags.scenarios else [s for s in SCENARIOS if (s == "cpu") != cuda]
    try:
        import trl.trainer.sft_trainer  # noqa: F401  loaded here, so that the children need not
    except ImportError as error:
        print(f"TRL is not measured ({error}): pip install -r benchmarks/requirements.txt", flush=True)
        trl_is_here = False
    else:
        trl_is_here = True
    device = torch.device("cpu" if scenarios == ["cpu"] else "cuda")
    ceiling, failed = None, False
    if flags.checks != "no":
        for line in alone(check_gradients, lengths, device):
            print(line, flush=True)
        for free_gib in (26, 34) if device.type == "cuda" else ():
            for line in alone(check_budget, lengths, free_gib):
                print(line, flush=True)
        if flags.checks == "only":
            return 0
    if device.type == "cuda":
        ceiling = alone(matmul_ceiling)
        print(f"8192 x 8192 x 8192 bf16 product: {ceiling:.0f} TFLOP/s", flush=True)
    lines, everything = [], []
    for scenario in scenarios:
        variants = flags.variants.split(",") if flags.variants else SCENARIOS[scenario].variants
        variants = [variant for variant in variants if trl_is_here or not variant.startswith("trl")]
        if SCENARIOS[scenario].examples <= 16:  # one micro-batch either way
            variants = [variant for variant in variants if variant != "trl_best"]
        found: dict[str, list[dict]] = {variant: [] for variant in variants}
        for _ in range(flags.repeat or (5 if scenario == "cpu" else 1)):
            for variant in variants:
                profile = None
                if flags.profile and variant == "ours":
                    Path(flags.profile).mkdir(parents=True, exist_ok=True)
                    profile = str(Path(flags.profile) / f"{scenario}.txt")
                print(f"--- {scenario}, {variant}: {WHAT[variant]}", flush=True)
                try:
                    found[variant].append(alone(measure, variant, scenario, lengths, profile))
                except RuntimeError as error:
                    failed = True
                    print(f"--- {scenario}, {variant} FAILED\n{error}", flush=True)
        results = []
        for runs in filter(None, found.values()):
            runs.sort(key=lambda result: result["tokens_per_s"])
            rates = [result["tokens_per_s"] for result in runs]
            results.append(runs[len(runs) // 2] | {"runs_tokens_per_s": rates} | stack())
        add_ratios(results, ceiling)
        everything += results
        for result in results:
            lines.append(json.dumps(result))
            print(lines[-1], flush=True)
            if flags.output:
                Path(flags.output).write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n" + table(everything), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())

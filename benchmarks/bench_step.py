r"""Tokens per second of the training step: this project, its padded ancestor and TRL's SFTTrainer, side by side.

    python benchmarks/bench_step.py                                       # on a GPU: every scenario, checks first
    python benchmarks/bench_step.py --scenarios cpu                       # a tiny model on the CPU
    python benchmarks/bench_step.py --scenarios original --variants ancestor,ours --output results.jsonl
    python benchmarks/bench_step.py --data_path my.csv --tokenizer my_model_folder    # the lengths of your rows

Every variant takes the same number of examples (or, where examples are packed into rows, of tokens) in each optimizer step,
runs in a process of its own, and goes through its own Trainer as a user's run does: `ours` and `ancestor` through
`utils.SupervisedTrainer`, with `ancestor` adding --packing False; `trl_*` through `trl.SFTTrainer`. Weights are random (speed
does not depend on them) and so are the token ids; the lengths are those of 9,310 real instruction rows, and so is how far prompts
begin alike (two templates and more). `ours_unshared` computes each of them whole (--share_prefixes False). TRL is measured where
benchmarks/requirements.txt is installed.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
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
from step_checks import check_budget, check_gradients
from step_variants import (
    LENGTHS,
    OURS,
    SCENARIOS,
    SHAPES,
    SLOW,
    WHAT,
    Clock,
    RandomRows,
    lengths_of,
    our_trainer,
    read_lengths,
    trl_trainer,
)

from sft.report.speed import ModelFlops, peak_tflops

# ----------------------------------------------------------------------------------------------------------- measuring


def measure(variant: str, scenario_name: str, lengths: np.ndarray, profile: str | None) -> dict[str, Any]:
    """Run one variant; what it did per second."""
    scenario, device = SCENARIOS[scenario_name], the_device(scenario_name)
    rows = RandomRows(lengths, scenario.max_length, SHAPES[scenario.shape].get("vocab_size", 32000))
    if variant in OURS:
        extra = OURS[variant]
        trainer: transformers.Trainer
        trainer, settled = our_trainer(scenario, rows, device, extra)
    else:
        trainer, settled = trl_trainer(variant, scenario, rows, device), None
    clock = Clock(*(scenario.slow_steps if variant in SLOW else scenario.steps), device).watch(trainer)
    flops = ModelFlops.of(trainer.model)  # type: ignore[arg-type]
    began = clock.now()
    with profiled(profile, trainer, clock):
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    if not all(np.isfinite(losses)):
        raise ArithmeticError(f"a loss is not a number: {losses}")
    counts = clock.counts()
    plan = settled and settled.memory_plan
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    peak = peak_tflops(device, torch.bfloat16)
    tflops, tflops_6n = (flops.step(counts, usual) / clock.seconds / 1e12 for usual in (False, True))
    return {
        "scenario": scenario_name,
        "variant": variant,
        "model": scenario.shape,
        "examples_per_step": scenario.examples,
        "tokens_per_step": counts.real / clock.steps,
        "step_s": clock.seconds / clock.steps,
        "tokens_per_s": counts.real / clock.seconds,
        "trained_tokens_per_s": counts.trained / clock.seconds,
        "padding_share": counts.padding_share(),
        "shared_share": counts.shared / counts.real,
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

"""The memory ladder on one GPU: each rung is the real command on a random model, with planned and measured peaks.

    python benchmarks/bench_ladder.py --work_dir /tmp/ladder --results benchmarks/results/ladder.jsonl

One JSON line for each rung as it ends, a Markdown table last. Weights are random: speed and memory do not depend on them. The rows are
random letters with the lengths of instruction data (log-normal, mean 207 tokens, cut at 1024), one token for each letter.
"""

import argparse
import contextlib
import dataclasses
import datetime
import importlib.metadata
import json
import os
import random
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30
SHARD_BYTES = 4 * GIB

MODELS = {
    "1.1B": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4},
    "3.4B": {"hidden_size": 3200, "intermediate_size": 8640, "num_hidden_layers": 26, "num_attention_heads": 32},  # open_llama_3b
    "6.7B": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32},  # open_llama_7b
    "0.2B": {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 12, "num_attention_heads": 16},  # on a CPU
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
}  # fmt: skip
CHECKPOINTING = "--gradient_checkpointing True"
RECIPE = (  # 64 examples in each step, as the original's command has on four GPUs
    "--bf16 True --model_max_length 1024 --per_device_train_batch_size 2 --gradient_accumulation_steps 32 --learning_rate 2e-5 "
    "--lr_scheduler_type cosine --warmup_ratio 0.05 --logging_steps 1 --save_strategy no --evaluation_strategy no --disable_tqdm True "
    "--save_rehearsal False"  # it asks the disk for a whole checkpoint of the larger models, which is never written here
)


@dataclasses.dataclass(frozen=True)
class Rung:
    """One run.

    to_the_end: False stops it after its last step: the export of a large model takes longer than the steps measured here.
    seconds: its time limit.
    """

    name: str
    model: str
    flags: str
    to_the_end: bool = False
    seconds: float = 110


RUNGS = [
    Rung("full", "1.1B", "--tokens_per_micro_batch 4096 --save_rehearsal True", to_the_end=True),
    Rung("full", "3.4B", "--tokens_per_micro_batch 2048"),
    Rung("+ checkpointing", "3.4B", f"--tokens_per_micro_batch 4096 {CHECKPOINTING}"),
    Rung("+ 8-bit Adam", "3.4B", f"--tokens_per_micro_batch 4096 {CHECKPOINTING} --optim adamw_bnb_8bit"),
    Rung("ZeRO-2 offload", "3.4B", f"--tokens_per_micro_batch 4096 {CHECKPOINTING} --deepspeed ds_config.json", to_the_end=True, seconds=260),
    Rung("full, 8-bit Adam", "6.7B", f"--tokens_per_micro_batch 16384 {CHECKPOINTING} --optim adamw_bnb_8bit"),
    Rung("LoRA", "6.7B", "--tokens_per_micro_batch 4096 --use_lora True"),
    Rung("QLoRA", "6.7B", "--tokens_per_micro_batch 4096 --use_lora True --load_in_4bit True"),
    Rung("FSDP2, one rank", "1.1B", '--tokens_per_micro_batch 4096 --fsdp "full_shard auto_wrap"', to_the_end=True),
    Rung("full, FSDP2, 8-bit Adam", "6.7B", f'--tokens_per_micro_batch 4096 {CHECKPOINTING} --optim adamw_torch_8bit --fsdp "full_shard auto_wrap"', seconds=130),
    Rung("FSDP2, one rank, budget auto", "1.1B", '--fsdp "full_shard auto_wrap"'),
]  # fmt: skip


# ------------------------------------------------------------------------------------------------ models and rows


def make_model(folder: Path, shape: dict) -> None:
    """Write a LLaMA with random bfloat16 weights, in shards, and a tokenizer of one token for each letter."""
    folder.mkdir(parents=True)
    fixed = {"vocab_size": 32000, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 2048}
    config = LlamaConfig(dtype=torch.bfloat16, **(fixed | shape))
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        sizes = {name: weight.shape for name, weight in AutoModelForCausalLM.from_config(config).named_parameters()}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, size in sizes.items():
        if sum(weight.nbytes for weight in shards[-1].values()) > SHARD_BYTES:
            _write_shard(folder, shards)
            shards.append({})
        weight = torch.empty(size, dtype=torch.bfloat16, device=device)
        shards[-1][name] = (weight.fill_(1.0) if len(size) == 1 else weight.normal_(0, 0.02)).cpu()
    _write_shard(folder, shards)
    names = {name: f"model-{number:05}.safetensors" for number, shard in enumerate(shards) for name in shard}
    index = {"metadata": {}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    letters_tokenizer().save_pretrained(folder)


def _write_shard(folder: Path, shards: list[dict[str, torch.Tensor]]) -> None:
    save_file(shards[-1], folder / f"model-{len(shards) - 1:05}.safetensors", metadata={"format": "pt"})
    shards[-1] = dict.fromkeys(shards[-1], torch.empty(0))  # the names are still needed, the weights are on the disk


def letters_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {
        letter: 3 + i for i, letter in enumerate(bytes_to_unicode().values())
    }
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in ("<unk>", "<s>", "</s>")])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


def make_rows(path: Path, rows: int) -> None:
    """Lengths as measured on 9,314 real instruction rows: mean 207 tokens, median 184, 99 % below 638."""
    draw = random.Random(0)
    letters = "abcdefghijklmnopqrstuvwxyz"
    with open(path, "w", encoding="utf-8") as file:
        file.write("prompt,response\n")
        for _ in range(rows):
            length = min(1022, max(20, round(draw.lognormvariate(5.2, 0.52))))
            text = "".join(draw.choices(letters, k=length))
            file.write(f"{text[: length // 2]},{text[length // 2 :]}\n")


# --------------------------------------------------------------------------------------------------------- one run


def host_used() -> int:
    """Bytes taken from this machine, files that it may drop left out. Page-locked memory shows here and in no process."""
    memory = psutil.virtual_memory()
    return memory.total - memory.available


class Gpu:
    """Bytes taken from the GPU, by everything: the driver's own and the allocator's fragments included."""

    def __init__(self):
        self.handle = None
        if torch.cuda.is_available():
            import pynvml

            pynvml.nvmlInit()
            self.nvml, self.handle = pynvml, pynvml.nvmlDeviceGetHandleByIndex(0)

    def used(self) -> int:
        return self.nvml.nvmlDeviceGetMemoryInfo(self.handle).used if self.handle else 0


# What a run prints when it has come so far; the seconds to the line stand in the results.
MILESTONES = {
    "imported": " is now `--",  # every run gives old flags
    "planned": "memory plan:",
    "first step": "  lr 0.00e+00",
    "trained": "trained to step",
}


def stop(process: subprocess.Popen) -> None:
    """Kill torchrun and its workers, which are sessions of their own: killing its process group would leave them on the GPU."""
    everyone = [*psutil.Process(process.pid).children(recursive=True), process]
    for each in everyone:
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended by itself
            each.kill()
    process.wait()


def wait_until_given_back(gpu: Gpu, gpu_before: int, host_before: int, seconds: float = 15) -> float:
    """Wait until the memory that a run took is free again, so that the next one does not measure it. Returns the GiB that are not."""
    until = time.perf_counter() + seconds
    while True:
        left = max(gpu.used() - gpu_before, host_used() - host_before) / GIB
        if left < 0.5 or time.perf_counter() > until:
            return max(left, 0.0)
        time.sleep(0.1)


def climb(rung: Rung, folder: Path, csv: Path, output: Path, steps: int, seconds: float) -> dict:
    """Run a rung and measure it."""
    words = [
        "llama_training.py",
        "--model_name_or_path",
        str(folder),
        "--data_path",
        str(csv),
        "--output_dir",
        str(output),
    ]
    words += [*RECIPE.split(), "--max_steps", str(steps), *shlex.split(rung.flags)]
    shutil.rmtree(output, ignore_errors=True)
    log = output.with_suffix(".log")
    gpu, host_before, began = Gpu(), host_used(), time.perf_counter()
    gpu_before, gpu_peak, host_training, host_peak = gpu.used(), 0, 0, 0
    reached: dict[str, float] = {}
    with open(log, "w", encoding="utf-8") as file:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", *words]
        environment = {**os.environ, "NO_COLOR": "1"}
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, env=environment)
        ended = "finished"
        try:
            while process.poll() is None:
                time.sleep(0.2)
                gpu_peak, host_peak = max(gpu_peak, gpu.used() - gpu_before), max(host_peak, host_used() - host_before)
                if "trained" not in reached:
                    host_training, printed = host_peak, log.read_text(encoding="utf-8")
                    for milestone, words_printed in MILESTONES.items():
                        if milestone not in reached and words_printed in printed:
                            reached[milestone] = round(time.perf_counter() - began, 1)
                trained = "trained" in reached and not rung.to_the_end
                if trained or time.perf_counter() - began > seconds:
                    ended = "stopped after its last step" if trained else f"stopped after {seconds:.0f} s"
                    stop(process)
        finally:  # also when this benchmark is told to stop
            if process.poll() is None:
                stop(process)
        if ended == "finished" and process.returncode:
            ended = f"exit code {process.returncode}"
    whole = time.perf_counter() - began
    left = wait_until_given_back(gpu, gpu_before, host_before)
    lines = log.read_text(encoding="utf-8")
    live = re.findall(r"step +(\d+)/\d+ .*?loss ([\d.na]+) .*? ([\d,]+) tok/s.*?mem ([\d.]+) GiB", lines)
    report_file = output / "run_report.json"
    report = json.loads(report_file.read_text(encoding="utf-8")) if report_file.is_file() else {}
    speeds = [int(speed.replace(",", "")) for _, _, speed, _ in live]
    plan = report.get("memory_plan", {})
    shutil.rmtree(output, ignore_errors=True)
    return {
        "rung": rung.name,
        "model": rung.model,
        "command": f"torchrun --nproc_per_node=1 {shlex.join(words)}",
        "ended": ended,
        "steps": len(live),
        "losses": [float(loss) for _, loss, _, _ in live],
        "tokens_per_s": round(statistics.median(speeds[2:])) if len(speeds) > 2 else None,
        "gpu_planned_gib": plan.get("gpu_peak_gib"),
        "gpu_measured_gib": max((float(peak) for *_, peak in live), default=None),  # PyTorch's allocator
        "gpu_taken_gib": gpu_peak / GIB,  # the driver's count
        "host_planned_gib": plan.get("host_peak_gib"),
        "host_measured_gib": (host_peak if rung.to_the_end else host_training) / GIB,
        "host_until_trained_gib": host_training / GIB,
        "plan": plan,
        "left_gib": left,  # not given back before the next rung began, on the GPU or in the host
        "seconds": {"reached": reached, "whole": whole, **report.get("durations_s", {})},
        "said": [line for line in lines.splitlines() if re.match(r"(attention|compiled|packing|save |memory plan|LoRA|  (GPU|host|micro|it))", line)],
        "tail": [] if live and ended != f"exit code {process.returncode}" else lines.splitlines()[-60:],
    }  # fmt: skip


def versions() -> dict[str, str]:
    names = ("torch", "transformers", "accelerate", "peft", "bitsandbytes", "deepspeed", "torchao")
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def error_of(planned: float | None, measured: float | None) -> str:
    """58.2 against 57.0 -> "+2 %"."""
    return f"{planned / measured - 1:+.0%}" if planned and measured else ""


def table(results: list[dict]) -> str:
    lines = [
        "| model | rung | tokens/s | GPU planned | GPU measured | | host planned | host measured | |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        numbers = []
        for where in ("gpu", "host"):
            planned, measured = r[f"{where}_planned_gib"], r[f"{where}_measured_gib"]
            numbers += [f"{value:.1f}" if value else "" for value in (planned, measured)] + [
                error_of(planned, measured)
            ]
        speed = f"{r['tokens_per_s']:,}" if r["tokens_per_s"] else r["ended"]
        lines.append("| " + " | ".join([r["model"], r["rung"], speed, *numbers]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work_dir", type=Path, required=True, help="models and outputs: up to 40 GB for all rungs")
    parser.add_argument("--results", type=Path, required=True, help="file that the JSON lines are added to")
    parser.add_argument("--rungs", help="numbers of the rungs to run, such as 0,3,4; default all")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--seconds", type=float, help="limit of each rung, instead of its own")
    parser.add_argument(
        "--model", choices=MODELS, help="use this model in every rung: `tiny` tries the commands on a CPU"
    )
    parser.add_argument("--keep_models", action="store_true", help="leave the random models in --work_dir")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))
    args.work_dir.mkdir(parents=True, exist_ok=True)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    csv = args.work_dir / "rows.csv"
    make_rows(csv, 64 * args.steps)
    numbers = [int(number) for number in args.rungs.split(",")] if args.rungs else range(len(RUNGS))
    card = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"
    about = {"date": datetime.date.today().isoformat(), "card": card, **versions()}
    results = []
    for number in numbers:
        rung = RUNGS[number]
        if args.model:
            rung = dataclasses.replace(rung, model=args.model)
        folder = args.work_dir / rung.model
        if not folder.exists():
            began = time.perf_counter()
            make_model(folder, MODELS[rung.model])
            print(f"made {folder}: {time.perf_counter() - began:.0f} s", flush=True)
        results.append(
            climb(rung, folder, csv, args.work_dir / f"rung{number}", args.steps, args.seconds or rung.seconds) | about
        )
        with open(args.results, "a", encoding="utf-8") as file:
            file.write(json.dumps(results[-1]) + "\n")
        print(table(results[-1:]).splitlines()[-1], results[-1]["seconds"]["reached"], results[-1]["ended"], flush=True)
    if not args.keep_models:
        for name in MODELS:
            shutil.rmtree(args.work_dir / name, ignore_errors=True)
    print(table(results))


if __name__ == "__main__":
    main()

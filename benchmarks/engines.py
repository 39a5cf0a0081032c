"""Whether every engine takes the same steps: one rank, DDP, FSDP2, HSDP, ZeRO-2 and ZeRO-3, packed and padded.

    python benchmarks/engines.py                                             # on a CPU over gloo, with 2 and 4 ranks
    python benchmarks/engines.py --ranks 2 --at_once 4 --results engines.jsonl     # on two GPUs over NCCL

Each run is llama_training.py on the same random LLaMA and rows, 16 examples in each of 5 steps of plain gradient descent, so that
weights show gradients as they are (Adam makes a last digit of a tiny gradient a whole step). Compared with one rank's packed
float32 run are the losses and gradient norms (largest relative difference of a step) and the exported weights (as one vector). The
weights to begin with are of bfloat16, as published ones are: DeepSpeed would round others, and it exports what it computed with.
A run with another seed must differ. float32 runs must agree within 1e-6, bfloat16 ones within 1e-3.
HSDP takes four ranks, two on each of two pretended machines. Exit code 1 when a run failed or differs. The table comes last.
"""

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from sameness import write_inputs
from transformers import AutoConfig, LlamaForCausalLM

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "support"))
RECIPE = """
    --max_steps 5 --learning_rate 0.2 --optim sgd --lr_scheduler_type constant --logging_steps 1 --model_max_length 128
    --per_device_train_batch_size 2 --save_strategy no --save_rehearsal False --save_dtype float32 --disable_tqdm True
"""
EXAMPLES, PER_DEVICE = 16, 2
WITHIN = {"float32": 1e-6, "bf16": 1e-3}
FSDP = ("--fsdp", "full_shard auto_wrap", "--fsdp_transformer_layer_cls_to_wrap", "LlamaDecoderLayer")
ENGINES: dict[str, tuple[str, ...]] = {
    "one rank": (),
    "ddp": (),
    "fsdp2": FSDP,
    "hsdp": ("--fsdp", "hybrid_shard auto_wrap", *FSDP[2:]),
    "zero-2": ("--deepspeed", "2"),
    "zero-3": ("--deepspeed", "3"),
}


class Case(NamedTuple):
    engine: str
    ranks: int
    packing: bool
    dtype: str
    seed: int = 3

    @property
    def name(self) -> str:
        packed = "packed" if self.packing else "padded"
        return (
            f"{self.engine}, {self.ranks} rank{'s' * (self.ranks > 1)}, {packed}, {self.dtype}"
            + ", another seed" * (self.seed != 3)
        )


def deepspeed_file(folder: Path, stage: str) -> Path:
    """The project's file without offloading, whose Adam would take the place of --optim, and with gradients added up in float32."""
    config = json.loads((ROOT / "ds_config.json").read_text("utf-8"))
    zero = {name: value for name, value in config["zero_optimization"].items() if not name.startswith("offload")}
    config |= {"zero_optimization": zero | {"stage": int(stage)}, "zero_allow_untested_optimizer": True}
    file = folder / f"stage{stage}.json"
    file.write_text(json.dumps(config), "utf-8")
    return file


def flags_of(case: Case, folder: Path, output: Path) -> list[str]:
    engine = [*ENGINES[case.engine]]
    if "--deepspeed" in engine:
        engine[-1] = str(folder / f"stage{engine[-1]}.json")
    flags = ["--model_name_or_path", str(folder / "model"), "--data_path", str(folder / "model" / "rows.csv")]
    flags += ["--output_dir", str(output), "--data_cache_dir", str(folder / "cache"), *RECIPE.split(), *engine]
    flags += ["--gradient_accumulation_steps", str(EXAMPLES // PER_DEVICE // case.ranks), "--seed", str(case.seed)]
    flags += ["--bf16", str(case.dtype == "bf16"), "--packing", str(case.packing)]
    flags += ["--tokens_per_micro_batch", "300"] * case.packing
    return flags + ["--use_cpu", "True"] * (not torch.cuda.is_available())


def run(case: Case, folder: Path, timeout_s: float) -> str:
    """Train; why that failed, or nothing. No process is left."""
    output = output_of(case, folder)
    shutil.rmtree(output, ignore_errors=True)
    Path(f"{output}.log").unlink(missing_ok=True)
    here = case.ranks // (2 if case.engine == "hsdp" else 1)  # two pretended machines
    shared = {"WORLD_SIZE": str(case.ranks), "LOCAL_WORLD_SIZE": str(here)}
    start = processes if torch.cuda.is_available() else forks
    codes = start(case, flags_of(case, folder, output), shared, Path(f"{output}.log"), timeout_s)
    return f"exit codes {codes}, see {output}.log" if any(codes) else ""


def forks(case: Case, flags: list[str], shared: dict[str, str], log: Path, timeout_s: float) -> list[int | None]:
    """The ranks' exit codes, on a CPU: forked as in the tests, which help FSDP2 to shard there."""
    import fsdp_over_gloo
    import jobs

    prepare = fsdp_over_gloo.prepare_rank if "--fsdp" in flags else None
    job = jobs.Job(flags, case.ranks, log, prepare, **shared)
    try:
        return job.wait(timeout_s)
    except AssertionError:  # too late
        return [rank.exitcode or -1 for rank in job.ranks]
    finally:
        job.kill()


def processes(case: Case, flags: list[str], shared: dict[str, str], log: Path, timeout_s: float) -> list[int | None]:
    """The same on GPUs, which forked processes cannot use."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "NO_COLOR": "1"}
    command = [sys.executable, str(ROOT / "llama_training.py"), *flags]
    with open(log, "w", encoding="utf-8") as file:
        ranks = [
            subprocess.Popen(
                command,
                env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
            for rank in range(case.ranks)
        ]
    until = time.monotonic() + timeout_s
    while time.monotonic() < until and any(r.poll() is None for r in ranks) and not any(r.poll() for r in ranks):
        time.sleep(0.1)
    for rank in ranks:  # where one has failed or hangs the others may wait for it
        try:
            rank.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(rank.pid, signal.SIGKILL)  # with its workers: each rank leads a session of its own
            rank.wait()
    return [rank.returncode for rank in ranks]


def output_of(case: Case, folder: Path) -> Path:
    return folder / case.name.replace(", ", "-").replace(" ", "-")


def results_of(case: Case, folder: Path) -> dict[str, Any]:
    output = output_of(case, folder)
    log = json.loads((output / "run_report.json").read_text("utf-8"))["log"]
    return {
        "losses": [entry["loss"] for entry in log],
        "norms": [entry["grad_norm"] for entry in log],
        "weights": load_file(output / "model.safetensors"),
    }


def differences(found: dict[str, Any], reference: dict[str, Any]) -> dict[str, float]:
    """The largest relative difference of losses and of gradient norms, and that of all weights."""
    largest = {}
    for name in ("losses", "norms"):
        pairs = zip(found[name], reference[name], strict=True)
        largest[name] = max(abs(value / expected - 1) for value, expected in pairs)
    apart = whole = 0.0
    for name, weight in reference["weights"].items():
        apart += float((found["weights"][name].double() - weight.double()).square().sum())
        whole += float(weight.double().square().sum())
    largest["weights"] = (apart / whole) ** 0.5
    return largest


def cases(ranks: list[int], engines: list[str], dtypes: list[str]) -> list[Case]:
    """The reference first, then a run that must differ."""
    found = [Case("one rank", 1, True, "float32"), Case("one rank", 1, True, "float32", seed=4)]
    for dtype in dtypes:
        for packing in (True, False):
            found += [Case("one rank", 1, packing, dtype)] * ((packing, dtype) != (True, "float32"))
            for count in ranks:
                found += [
                    Case(engine, count, packing, dtype)
                    for engine in engines
                    if engine != "one rank" and (engine != "hsdp" or count == 4)
                ]
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4], choices=(2, 4, 8))
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=list(ENGINES))
    parser.add_argument("--dtypes", nargs="+", default=list(WITHIN), choices=list(WITHIN))
    parser.add_argument("--at_once", type=int, default=1, help="runs at the same time")
    parser.add_argument("--timeout_s", type=float, default=180, help="of one run")
    parser.add_argument("--work_dir", type=Path, help="keeps models and logs")
    parser.add_argument("--results", type=Path, help="a JSON line for each run is added to it")
    args = parser.parse_args(argv)
    folder = (args.work_dir or Path(tempfile.mkdtemp(prefix="engines-"))).resolve()
    write_inputs(folder / "model")
    torch.manual_seed(0)
    wider = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    model = LlamaForCausalLM(AutoConfig.from_pretrained(folder / "model", **wider))
    model.bfloat16().float().save_pretrained(folder / "model")
    for stage in "23":
        deepspeed_file(folder, stage)
    todo = cases(args.ranks, args.engines, args.dtypes)
    failed = {todo[0]: run(todo[0], folder, args.timeout_s)}  # alone: it tokenizes for all
    if failed[todo[0]]:
        sys.exit(f"{todo[0].name}: {failed[todo[0]]}")
    with ThreadPoolExecutor(args.at_once) as pool:
        for case, problem in zip(todo[1:], pool.map(lambda case: run(case, folder, args.timeout_s), todo[1:])):
            failed[case] = problem
            print(f"{case.name}: {problem or 'done'}", flush=True)
    reference, wrong = results_of(todo[0], folder), 0
    print(f"\nreference: {todo[0].name}: losses {reference['losses'][0]:.4f} ... {reference['losses'][-1]:.4f}")
    print(f"{'run':<44}{'loss':>9}{'norm':>9}{'weights':>9}")
    for case in todo[1:]:
        found: dict[str, Any] = {"problem": failed[case]} if failed[case] else {}
        said, differs = failed[case], True
        if not failed[case]:
            found = differences(results_of(case, folder), reference)
            said = "".join(f"{value:>9.1e}" for value in found.values())
            differs = max(found["losses"], found["weights"]) > WITHIN[case.dtype]
        right = differs and not failed[case] if case.seed != 3 else not differs
        wrong += not right
        print(f"{case.name:<44}{said}{'' if right else '   WRONG'}")
        if args.results:
            device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"
            about = {"device": device, "torch": torch.__version__, "right": right}
            with open(args.results, "a", encoding="utf-8") as file:
                file.write(json.dumps({"run": case.name} | found | about) + "\n")
    print(f"{len(todo) - 1 - wrong} of {len(todo) - 1} runs are as they must be ({folder})")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())

"""Whether a restructured checkout trains as an older one does, byte for byte: the proof for changes that must change nothing.

    git worktree add ../before COMMIT
    python benchmarks/sameness.py --baseline ../before --keep ../sameness

Both checkouts' llama_training.py runs on the CPU, one run after the other, on a tiny random LLaMA, its tokenizer and a CSV that
are made here. Compared are the logged losses, gradient norms and learning rates of each step, evaluations and answers, and every
tensor of the exported model and of the last checkpoint, optimizer included.

    whole      a run from its first step to its last one
    resumed    the same from its own checkpoint in the middle
    crossed    the same from the baseline's checkpoint and cached tokens, which the candidate may refuse (exit code 2, one
               message) and must not misread

Another seed must differ, or the comparison proves nothing. --keep keeps the baseline's runs for the next time. Exit code 1 when
any run is not as it must be.
"""

import argparse
import csv
import gc
import hashlib
import json
import multiprocessing
import os
import random
import runpy
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import accelerate
import torch
import transformers
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

PRELOADED = ["__main__", "transformers.trainer", "transformers.models.llama.modeling_llama", "deepspeed", "peft"]
HALFWAY = 6
RECIPE = f"""
    --use_cpu True --max_steps 12 --learning_rate 5e-3 --lr_scheduler_type cosine --warmup_ratio 0.25 --logging_steps 1 --seed 3
    --model_max_length 128 --per_device_train_batch_size 2 --gradient_accumulation_steps 4 --save_strategy steps
    --save_steps {HALFWAY} --disable_tqdm True
"""
FSDP = "--fsdp full_shard --fsdp_transformer_layer_cls_to_wrap LlamaDecoderLayer"
EVALUATION = "--eval_split 0.2 --eval_strategy steps --eval_steps 3 --eval_samples 2 --load_best_model_at_end True"
OTHER_SEED = "another-seed"


class Case(NamedTuple):
    flags: str = ""
    ranks: int = 1
    runs: tuple[str, ...] = ("whole",)
    launched: bool = False  # by python or torchrun, and not forked


ALL_RUNS = ("whole", "resumed", "crossed")
CASES = {
    "python": Case(launched=True),
    "torchrun": Case("--packing False", 2, launched=True),
    "packed": Case("", 1, ALL_RUNS),
    "padded": Case("--packing False"),
    "bf16": Case("--bf16 True"),
    "micro-batches": Case("--tokens_per_micro_batch 200"),
    "micro-batches-bf16": Case("--tokens_per_micro_batch 200 --bf16 True"),
    "unshared": Case("--share_prefixes False"),
    "recomputed": Case("--gradient_checkpointing True"),
    "evaluated": Case(EVALUATION),
    "lora": Case("--bf16 True --use_lora True --lora_r 4", 1, ALL_RUNS),
    "two-ranks": Case("", 2, ALL_RUNS),
    "two-ranks-padded": Case("--packing False --bf16 True", 2),
    "zero-2": Case("--deepspeed ds_config.json", 2, ALL_RUNS),
    "fsdp": Case(FSDP, 2, ALL_RUNS),
    "fsdp-lora": Case(f"{FSDP} --bf16 True --use_lora True --lora_r 4 --merge_lora True", 2),
    OTHER_SEED: Case("--seed 4"),  # compared with the baseline's first case
}


def write_inputs(folder: Path) -> None:
    """A random LLaMA of two layers, a tokenizer of characters, and 64 rows of 60 to 150 tokens that begin alike; always the same."""
    folder.mkdir(parents=True, exist_ok=True)
    transformers.utils.logging.disable_progress_bar()
    words = ["<unk>", "<s>", "</s>", "<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={word: index for index, word in enumerate(words)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words), **shape)).save_pretrained(folder)
    rng, nouns = random.Random(0), "river baker engine garden letter mountain window teacher market winter".split()
    rows = [("prompt", "response"), ("an empty response", ""), ("no room " * 20, "is left")]
    for index in range(62):
        some, begin = rng.choices(nouns, k=rng.randint(2, 5)), ("Answer in a few words.\n\nQ: ", "The last word of: ")
        rows.append((f"{begin[index % 2]}{' '.join(some)}\n", f"It is {some[-1]}, after {' and '.join(some[:-1])}."))
    with open(folder / "rows.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


# -------------------------------------------------------------------------------------------------------------- runs


def attempt(checkout: Path, case: Case, inputs: Path, output: Path, cache: Path, resume: Path | None) -> dict[str, Any]:
    """Run a checkout's script, from a checkpoint or from the beginning: exit code, seconds, values. It prints to OUTPUT.log."""
    output.mkdir(parents=True)
    flags = ["--model_name_or_path", str(inputs), "--data_path", str(inputs / "rows.csv"), "--output_dir", str(output)]
    flags += ["--data_cache_dir", str(cache), *RECIPE.split(), *case.flags.split()]
    if resume:
        shutil.copytree(resume, output / resume.name)
        flags += ["--resume_from_checkpoint", "True"]
    script, log, began = checkout / "llama_training.py", f"{output}.log", time.perf_counter()
    code = (launch if case.launched else fork)(str(script), flags, case.ranks, log)
    seconds = time.perf_counter() - began
    return {"code": code, "seconds": seconds, "values": values_of(output) if code == 0 else {}}


def launch(script: str, flags: list[str], ranks: int, log: str) -> int:
    """Run a script as users do, with python or torchrun; the exit code."""
    torchrun = f"-m torch.distributed.run --nproc_per_node={ranks} --rdzv_backend=c10d --rdzv_endpoint=127.0.0.1:0"
    command = [sys.executable, *(torchrun.split() if ranks > 1 else []), script, *flags]
    with open(log, "w", encoding="utf-8") as file:
        return subprocess.run(command, stdout=file, stderr=file, cwd=Path(script).parent).returncode


def fork(script: str, flags: list[str], ranks: int, log: str) -> int:
    """The same, each rank forked from a server that has imported the libraries, which takes most of so short a run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
        shared |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    processes = []
    for rank in range(ranks):
        mine = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} if ranks > 1 else {}
        arguments = (script, flags, mine, log)
        processes.append(multiprocessing.get_context("forkserver").Process(target=be_a_rank, args=arguments))
        processes[-1].start()
    while any(process.is_alive() for process in processes) and not any(process.exitcode for process in processes):
        time.sleep(0.05)
    code = next((process.exitcode for process in processes if process.exitcode), 0)
    for process in processes:  # where one has failed the others may wait for it
        process.join(20)
        process.kill()
        process.join()
    return code


def be_a_rank(script: str, flags: list[str], environment: dict[str, str], log: str) -> None:
    """In a process of its own: run the script, with torchrun's environment."""
    gc.freeze()  # the Trainer collects garbage, in all that the server imported
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    os.environ |= environment
    os.chdir(Path(script).parent)
    sys.argv, sys.path[0] = [script, *flags], str(Path(script).parent)
    sharded = shard_on_the_cpu() if "--fsdp" in flags else [True]
    runpy.run_path(script, run_name="__main__")
    assert any(sharded), "FSDP sharded nothing"


def shard_on_the_cpu() -> list[bool]:
    """Let FSDP2 shard over gloo on the CPU, where users have no such thing; for each parameter, once there are some, whether it did.

    The scripts take --fsdp back on a CPU before they make their TrainingArguments: those get it again. Accelerate (1.15, state.py)
    turns FSDP on next to an accelerator only: its state is told afterwards.
    """
    settle, prepare = transformers.TrainingArguments.__post_init__, accelerate.state.AcceleratorState.__init__
    shard, sharded = accelerate.accelerator.fsdp2_prepare_model, list[bool]()

    def settle_with_fsdp(self):
        self.fsdp, self.fsdp_config = True, {"version": 2, "cpu_ram_efficient_loading": True}
        self.fsdp_config |= {"reshard_after_forward": True, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
        settle(self)

    def prepare_with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        prepare(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type = DistributedType.FSDP
            accelerate.state.PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin

    def shard_and_look(*args):
        model = shard(*args)
        sharded.extend(isinstance(p, torch.distributed.tensor.DTensor) for p in model.parameters())
        return model

    transformers.TrainingArguments.__post_init__ = settle_with_fsdp
    accelerate.state.AcceleratorState.__init__ = prepare_with_fsdp
    accelerate.accelerator.fsdp2_prepare_model = shard_and_look
    return sharded


LOGGED = "loss grad_norm learning_rate padding_share shared_share eval_loss eval_tokens answer".split()


def values_of(output: Path) -> dict[str, str]:
    """What a finished run logged and saved, in that order: {what: a number as Python writes it, or a digest}."""
    report = json.loads((output / "run_report.json").read_text("utf-8"))
    last = max(output.glob("checkpoint-*"), key=lambda folder: int(folder.name.split("-")[1]))
    state = json.loads((last / "trainer_state.json").read_text("utf-8"))
    packing = report.get("packing", {}).items()
    found = {f"packing {name}": repr(value) for name, value in packing if not isinstance(value, str)}
    recorded = [*report["log"], *report["evaluations"], *report["samples"]]
    for file, entries in (("record", recorded), ("state", state["log_history"])):
        for entry in entries:
            at = f"{file}, step {entry['step']}, {entry.get('prompt', '')}"
            found |= {at + name: repr(entry[name]) for name in LOGGED if name in entry}
    kept = last.rglob("*")
    if any(last.glob("global_step*")):  # until December 2026 a checkpoint of DeepSpeed's held the model once more
        kept = (path for path in last.rglob("*") if path.suffix != ".safetensors")
    for path in sorted([*output.glob("*.safetensors"), *kept]):
        tensors: Any = {}
        if path.suffix == ".safetensors":
            tensors = load_file(path)
        elif path.suffix in (".pt", ".bin") and ("optim" in path.name or "model" in path.name):
            tensors = torch.load(path, map_location="cpu", weights_only=False)
        found |= {f"{path.relative_to(output)} {name}": digest for name, digest in digests(tensors)}
    return found


def digests(value: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """(name, type and SHA-256) of each tensor in nested dicts and lists."""
    if isinstance(value, torch.Tensor):
        content = value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        yield name, f"{value.dtype} {tuple(value.shape)} {hashlib.sha256(content).hexdigest()}"
    elif isinstance(value, dict | list | tuple):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from digests(item, f"{name}.{key}" if name else str(key))


# -------------------------------------------------------------------------------------------------------- comparison


def baseline_runs(name: str, checkout: Path, folder: Path) -> dict[str, dict]:
    """The baseline's runs of a case, kept from an earlier time where code, flags, inputs and libraries are the same."""
    inputs, cache, case = folder.parent / "inputs", folder / "cache", CASES[name]
    key = hashlib.sha256(repr((case, RECIPE, torch.backends.cpu.get_cpu_capability())).encode())
    key.update(f"{torch.__version__} {transformers.__version__} {accelerate.__version__}".encode())
    code = [*checkout.glob("*.py"), *checkout.glob("*.json"), *checkout.glob("sft/**/*.py")]
    for path in sorted([*code, *inputs.iterdir()]):
        key.update(path.read_bytes())
    kept = folder / name / "kept.json"
    if kept.is_file() and (before := json.loads(kept.read_text("utf-8")))["key"] == key.hexdigest():
        return before["runs"]
    shutil.rmtree(folder / name, ignore_errors=True)
    runs: dict[str, dict] = {}
    for run in (run for run in case.runs if run != "crossed"):
        resume = folder / name / "whole" / f"checkpoint-{HALFWAY}" if run == "resumed" else None
        runs[run] = attempt(checkout, case, inputs, folder / name / run, cache, resume)
        if runs[run]["code"]:
            raise SystemExit(f"error: the baseline failed, see {folder / name / run}.log")
    kept.write_text(json.dumps({"key": key.hexdigest(), "runs": runs}, indent=1), "utf-8")
    return runs


def difference(before: dict[str, str], after: dict[str, str]) -> str:
    """How many values differ, and the first of them; "" where none does."""
    other = [name for name in before | after if before.get(name) != after.get(name)]
    first = f"{other[0]}: {before.get(other[0])} -> {after.get(other[0])}" if other else ""
    return f"{len(other)} of {len(before)} values differ, first {first}" if other else ""


def compare(name: str, run: str, runs: dict[str, dict], candidate: Path, folder: Path) -> tuple[dict, str, bool]:
    """Run the candidate; its result, what is to be said of it, and whether that is as it must be."""
    case, output, cache = CASES[name], folder / "candidate" / name / run, folder / "candidate" / "cache"
    source = folder / ("baseline" if run == "crossed" else "candidate") / name / "whole" / f"checkpoint-{HALFWAY}"
    if run == "resumed" and not source.is_dir():
        return {"seconds": 0.0, "values": {}}, f"there is no {source}", False
    if run == "crossed":
        cache = shutil.copytree(folder / "baseline" / "cache", output.with_name("cache"))
    files = len(list(cache.rglob("*")))
    after = attempt(candidate, case, folder / "inputs", output, cache, None if run == "whole" else source)
    before = runs["resumed" if run == "crossed" else run]
    if after["code"]:
        printed = output.with_name(f"{run}.log").read_text("utf-8")
        messages = printed.split("error: ")[1:]
        if run == "crossed" and after["code"] == 2 and len(messages) == 1 and "Traceback" not in printed:
            return after, f"refused: {' '.join(messages[0].split())}", True
        return after, f"exit code {after['code']}, see {output}.log", False
    differs = difference(before["values"], after["values"])
    if name == OTHER_SEED:
        return after, f"differs, as it must: {differs}" if differs else "does NOT differ", bool(differs)
    said = differs or f"equal ({len(after['values'])} values)"
    if run == "crossed":
        said += f"; cached tokens {'read' if len(list(cache.rglob('*'))) == files else 'made anew'}"
    if run == "resumed":
        said += f"; to the whole run: {difference(runs['whole']['values'], after['values']) or 'equal'}"
    return after, said, not differs


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--baseline", type=Path, required=True, help="checkout to compare with")
    parser.add_argument("--candidate", type=Path, default=Path(__file__).resolve().parent.parent, help="default: this")
    parser.add_argument("--only", nargs="+", choices=CASES, default=list(CASES), metavar="NAME", help=", ".join(CASES))
    parser.add_argument("--keep", type=Path, help="folder for all runs; the baseline's are used again the next time")
    args = parser.parse_args()
    os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "DS_ACCELERATOR": "cpu"}
    # DeepSpeed's compiler looks for ninja next to Python, which is on no PATH where no environment is activated
    os.environ["PATH"] += f"{os.pathsep}{Path(sys.executable).parent}"
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    folder = (args.keep or Path(tempfile.mkdtemp(prefix="sameness-"))).resolve()
    shutil.rmtree(folder / "candidate", ignore_errors=True)
    write_inputs(folder / "inputs")
    count = wrong = 0
    print(f"{'case':<19}{'run':<9}{'steps':>5}{'before':>9}{'after':>9}")
    for name in args.only:
        runs = baseline_runs("packed" if name == OTHER_SEED else name, args.baseline.resolve(), folder / "baseline")
        for run in CASES[name].runs:
            result, said, right = compare(name, run, runs, args.candidate.resolve(), folder)
            steps = sum(key.startswith("state") and key.endswith(" loss") for key in result["values"])
            before = f"{runs[run]['seconds']:.1f} s" if run in runs else "-"
            said = said if right else f"WRONG: {said}"
            print(f"{name:<19}{run:<9}{steps:>5}{before:>9}{result['seconds']:>7.1f} s  {said}", flush=True)
            count, wrong = count + 1, wrong + (not right)
    print(f"{count - wrong} of {count} runs are as they must be ({folder})")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())

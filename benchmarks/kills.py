"""Kill real runs at random and at chosen moments, fill their disk, resume them, and compare with an undisturbed run.

    unshare -rm python benchmarks/kills.py --folder /tmp/kills      # 200 kills and 40 faults take about an hour on two cores

It shares no code with the scripts or their tests: the model is written by hand, and the folder's claims are checked from their
definition. After each kill every checkpoint is what its manifest says, none is lost, and a COMPLETE.json is of the model next to it.
At its end a run has the undisturbed run's weights, byte for byte. `unshare -rm` lets a user mount the small disk that is filled
and made read-only; without it files are limited in size alone. Most runs are forked from this process, which has imported the
libraries; one in ten is started as a user does, and all those under torchrun.
"""

import argparse
import collections
import contextlib
import csv
import faulthandler
import gc
import hashlib
import json
import os
import random
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

os.environ |= {"OMP_NUM_THREADS": "1", "NO_COLOR": "1", "PYTHONFAULTHANDLER": "1"}
import accelerate  # noqa: F401  these and the next: once for all runs that are forked
import peft  # noqa: F401
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Trainer  # noqa: F401

SCRIPT = str(Path(__file__).resolve().parent.parent / "llama_training.py")
RECIPE = "--model_name_or_path model --data_path rows.csv --data_cache_dir cache --num_train_epochs 2 --learning_rate 1e-2 --save_steps 2 --use_cpu True"
RECIPE += " --per_device_train_batch_size 2 --gradient_accumulation_steps 4 --model_max_length 96 --logging_steps 1 --resume_from_checkpoint True"
EVALUATED = "--eval_split 0.2 --eval_strategy steps --eval_steps 2 --load_best_model_at_end True --learning_rate 0.1 --save_total_limit 1"
SCENARIOS = {  # flags, ranks, and of 20 kills how many
    "packed": ("--save_total_limit 2", 1, 4),
    "padded": ("--packing False --save_strategy epoch", 1, 2),
    "best checkpoint": (EVALUATED, 1, 5),
    "early stop": (EVALUATED + " --early_stopping_patience 1 --num_train_epochs 9", 1, 4),
    "LoRA": ("--use_lora True --merge_lora True --save_total_limit 2", 1, 2),
    "two ranks": ("--save_total_limit 2", 2, 2),
    "torchrun": ("--save_total_limit 2", 2, 1),
}
TORCHRUN = "-m torch.distributed.run --nproc_per_node=2 --rdzv_backend=c10d --rdzv_endpoint=127.0.0.1:0".split()
SIGNALS, REMOUNT = ("SIGKILL", "SIGKILL", "SIGTERM", "SIGHUP", "SIGINT"), ("mount", "-o", "remount", "-o")
ANY, FAULTS = "any", ("full disk", "read-only", "large files fail")
MOMENTS = (  # what appears in the output folder while something is saved or exported
    "incomplete/*/incomplete/*/*", "incomplete/checkpoint-*", "incomplete/checkpoint-*/*.safetensors", "incomplete/checkpoint-*/optimizer.pt",
    "incomplete/checkpoint-*/trainer_state.json", "incomplete/checkpoint-*/.manifest.json.new", "incomplete/checkpoint-*/manifest.json",
    "incomplete/removed", "checkpoint-*", "config.json", "*.safetensors", "adapter/*.safetensors", "tokenizer.json", "chat_template.jinja",
    "run_report.json", "README.md", ".COMPLETE.json.new", "COMPLETE.json",
)  # fmt: skip


def write_inputs(folder: Path) -> None:
    """Rows, a LLaMA of two layers, and a tokenizer whose ids are bytes."""
    sums = [(f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}.") for a in range(1, 9) for b in range(1, 8)]
    with open(folder / "rows.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("prompt", "response"), *sums])
    ends = {"bos_token_id": 257, "eos_token_id": 258, "pad_token_id": 256}
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=260, num_key_value_heads=2, max_position_embeddings=128, **shape, **ends)
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *special.values()]
    tokenizer = Tokenizer(models.BPE(vocab={name: number for number, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder / "model")


def sha256(path: Path) -> str:
    """As a manifest has it: SHA-256 over the SHA-256 of each 64 MiB."""
    data, piece = path.read_bytes(), 64 * 2**20
    digests = [hashlib.sha256(data[start : start + piece]).digest() for start in range(0, len(data), piece)]
    return hashlib.sha256(b"".join(digests)).hexdigest()


def untrue(folder: Path, claim: str) -> list[str]:
    """What a manifest or a COMPLETE.json says that is not so."""
    try:
        listed = json.loads((folder / claim).read_text())["files"]
    except (OSError, ValueError) as error:
        return [f"{folder.name}/{claim}: {error}"]
    same = {f for f, e in listed.items() if (folder / f).is_file() and sha256(folder / f) == e["sha256"]}
    return [f"{folder.name}/{claim} is untrue of {file}" for file in listed.keys() - same]


def weights(folder: Path) -> dict[str, str]:
    found = {str(path.relative_to(folder)): path for path in sorted(folder.glob("**/*.safetensors"))}
    return {name: sha256(path) for name, path in found.items() if not name.startswith(("checkpoint-", "incomplete"))}


def become_the_script(flags: list[str], environment: dict[str, str]) -> None:
    """In a forked process: run the script as its own interpreter would."""
    code: object = 0
    try:
        sys.argv, sys.path[0] = [SCRIPT, *flags], str(Path(SCRIPT).parent)
        os.environ |= environment
        runpy.run_path(SCRIPT, run_name="__main__")
    except SystemExit as ended:
        code = ended.code
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        code = 130 if isinstance(error, KeyboardInterrupt) else 1
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code if isinstance(code, int) else code is not None)


class Runs:
    """The runs of one scenario, in a folder that is a disk of its own where that is allowed."""

    def __init__(self, name: str, home: Path, dice: random.Random):
        self.name, self.home, self.dice, self.problems, self.lives = name, home, dice, list[str](), 0
        self.flags, self.ranks, _ = SCENARIOS[name]
        self.disk, self.log = home / name.replace(" ", "_"), home / f"log of {name}"
        self.disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(self.disk)]
        self.mounted = subprocess.run(mount, stderr=subprocess.DEVNULL).returncode == 0
        self.output, self.moments = self.disk / "out", list(MOMENTS)
        began, met = time.monotonic(), set[str]()
        self.start()
        while self.processes():
            met |= {moment for moment in MOMENTS if self.there(moment)}
        if any(self.codes):
            sys.exit(f"{name}: the undisturbed run ended with {self.codes}\n{self.log.read_text()}")
        self.seconds, self.expected, self.moments = time.monotonic() - began, weights(self.output), sorted(met)
        print(f"{name}: undisturbed {self.seconds:.0f} s; {len(met)} moments of saving", flush=True)

    def start(self, largest_file: int = resource.RLIM_INFINITY) -> None:
        """Start the command once more."""
        self.lives, self.children, self.codes = self.lives + 1, list[int](), list[int]()
        flags = [*RECIPE.split(), *self.flags.split(), "--output_dir", str(self.output)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        meeting = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        forked = self.name != "torchrun" and (self.ranks > 1 or self.dice.random() < 0.9)
        for rank in map(str, range(self.ranks if forked else 1)):
            if child := os.fork():
                self.children.append(child)
                continue
            os.chdir(self.home)
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, largest_file))
            output = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | (os.O_TRUNC if rank == "0" else 0))
            os.dup2(output, 1), os.dup2(output, 2)
            if forked:
                become_the_script(flags, {**meeting, "RANK": rank, "LOCAL_RANK": rank} if self.ranks > 1 else {})
            os.execv(sys.executable, [sys.executable, *TORCHRUN * (self.ranks > 1), SCRIPT, *flags])

    def processes(self) -> list[int]:
        """The processes of the command that still run, of a launcher its workers too; the exit codes of others are noted."""
        for child in list(self.children):
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                self.children.remove(child)
                self.codes.append(os.waitstatus_to_exitcode(status))
        workers = []
        for folder in Path("/proc").glob("[0-9]*") if self.name == "torchrun" else ():
            try:
                state, words = (folder / "stat").read_text().rpartition(")")[2], (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if str(self.output).encode() in words and state.split()[0] != "Z":
                workers.append(int(folder.name))
        return [*self.children, *(pid for pid in workers if pid not in self.children)]

    def there(self, pattern: str) -> dict[Path, int]:
        """The files and folders of a name, each with its inode: a new one has another."""
        try:
            return {path: path.stat().st_ino for path in self.output.glob(pattern)}
        except OSError:  # one was renamed meanwhile
            return {}

    def wait_for_a_moment(self) -> str:
        """Wait until something is being saved, or for any moment of the command's life."""
        moment = self.dice.choice([ANY, *self.dice.sample(self.moments, 3)])
        until = time.monotonic() + (self.dice.uniform(0, self.seconds) if moment == ANY else 120)
        before, skip = self.there(moment), self.dice.choice((0, 0, 1))
        while self.processes() and time.monotonic() < until:
            now = self.there(moment) if moment != ANY else {}
            new, before = now.items() - before.items(), before | now
            skip -= len(new)
            if new and (skip < 0 or "checkpoint-" not in moment):
                time.sleep(self.dice.choice((0, 0, 0.003, 0.03, 0.1)))
                break
            time.sleep(0.001)
        return moment

    def disturb_once(self, what: str) -> str | None:
        """One life with a signal or a failing disk: the moment, or None if it was over before. The disk is mended afterwards."""
        filler, is_signal, limit = self.disk / "filler", what.startswith("SIG"), resource.RLIM_INFINITY
        self.start(self.dice.randint(1, 300_000) if what == "large files fail" else limit)
        moment = ANY if what == "large files fail" else self.wait_for_a_moment()
        alive = self.processes()
        if alive and is_signal:
            os.kill(self.dice.choice(alive), getattr(signal, what))
        if what == "full disk":
            leave = self.dice.choice((0, 4096, 65536, 300_000))
            with open(filler, "wb") as file, contextlib.suppress(OSError):  # the run has just written more
                os.posix_fallocate(file.fileno(), 0, max(1, shutil.disk_usage(self.disk).free - leave))
        while what == "read-only" and subprocess.run([*REMOUNT, "ro", self.disk], stderr=subprocess.DEVNULL).returncode:
            time.sleep(0.001)  # a file is open for writing
        number = getattr(signal, what) if is_signal else 0
        self.judge(f"{what} at {moment}", {-number, 128 + number} if number else set())
        if what == "read-only":
            subprocess.run([*REMOUNT, "rw", self.disk], check=True)
        filler.unlink(missing_ok=True)
        return moment if alive else None

    def judge(self, what: str, codes: set[int]) -> None:
        """Wait for the end of a life; what it said must be so."""
        until = time.monotonic() + 300
        while left := self.processes():
            if "(not started yet)" in self.log.read_text(
                errors="replace"
            ):  # killed before it met the other, which waits for it and prints so
                for pid in left:
                    os.kill(pid, signal.SIGKILL)
            elif time.monotonic() > until:
                for pid in left:
                    os.kill(pid, signal.SIGABRT)  # faulthandler prints where it is
                time.sleep(1)
                for pid in self.processes():
                    os.kill(pid, signal.SIGKILL)
                self.note(f"{what}: it does not end")
            time.sleep(0.01)
        printed = self.log.read_text(errors="replace")
        if self.name == "torchrun":  # it prints a traceback of its own, and ends with 1
            return
        if "Traceback" in printed and "Connection closed by peer" not in printed:  # gloo's, of the rank that was killed
            self.note(f"{what}: a traceback")
        others = {0, 2, 4} | ({1, -signal.SIGABRT} if self.ranks > 1 else set())  # 4: stopped, the last steps not saved
        if unexpected := set(self.codes) - others - codes:
            self.note(f"{what}: ended with {unexpected}")
        told = ("model saved in", "nothing is left to do", "To continue:")
        if set(self.codes) == {0} and not any(text in printed for text in told):
            self.note(f"{what}: exit code 0 without a model, or the command to continue")

    def newest_step(self) -> int:
        """The highest step whose checkpoint is whole. What the folder claims must be so."""
        for folder in self.output.glob("checkpoint-*"):
            for wrong in untrue(folder, "manifest.json"):
                self.note(wrong)
        complete = (self.output / "COMPLETE.json").exists()
        if complete and (untrue(self.output, "COMPLETE.json") or weights(self.output) != self.expected):
            self.note(f"COMPLETE.json without its model: {untrue(self.output, 'COMPLETE.json')}")
        return max((int(f.name.removeprefix("checkpoint-")) for f in self.output.glob("checkpoint-*")), default=0)

    def note(self, problem: str) -> None:
        self.problems.append(f"{self.name}, life {self.lives}: {problem}")
        kept = self.home / f"problem {self.name} {len(self.problems)}"
        kept.mkdir()
        shutil.copy(self.log, kept)
        if self.output.is_dir():
            shutil.copytree(self.output, kept / "out", symlinks=True)
        print(f"PROBLEM: {self.problems[-1]} ({kept})", flush=True)

    def disturb(self, todo: list, table: collections.Counter) -> None:
        """Run after run, each disturbed a few times and then left alone to its end."""
        while todo:
            shutil.rmtree(self.output)
            reached = 0
            for _ in range(self.dice.randint(3, 12)):
                if not todo or (self.output / "COMPLETE.json").exists():
                    break
                if moment := self.disturb_once(todo[-1]):
                    table[self.name, todo.pop(), moment != ANY] += 1
                now = self.newest_step()
                if now < reached:
                    self.note(f"step {reached} is lost, {now} is left")
                reached = now
            self.start()
            began = time.monotonic()
            self.judge("the last life", set())
            self.seconds = min(self.seconds, time.monotonic() - began)
            self.newest_step()
            if weights(self.output) != self.expected or not (self.output / "COMPLETE.json").is_file():
                self.note("not the undisturbed run's model")
            print(f"{self.name}: {len(todo)} to come, {self.lives} lives, {len(self.problems)} problems", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"kills": 200, "faults": 40, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--scenarios", nargs="+", default=list(SCENARIOS), choices=list(SCENARIOS))
    parser.add_argument("--folder", type=Path, required=True, help="new, for the model, the runs and the problems")
    flags = parser.parse_args()
    flags.folder.mkdir(parents=True)
    home, dice = flags.folder.resolve(), random.Random(flags.seed)
    write_inputs(home)
    sys.modules["matplotlib"] = None  # type: ignore[assignment]  # where it is missing nothing is drawn: half of such a run's time
    gc.freeze()
    faulthandler.enable()
    table: collections.Counter[tuple[str, str, bool]] = collections.Counter()
    problems = []
    shares = [SCENARIOS[name][2] for name in flags.scenarios]
    drawn = dice.choices(flags.scenarios, shares, k=flags.kills + flags.faults)
    for name in flags.scenarios:
        runs = Runs(name, home, dice)
        kinds = FAULTS if runs.mounted else FAULTS[2:]
        todo = [dice.choice(SIGNALS if n < flags.kills else kinds) for n, other in enumerate(drawn) if other == name]
        dice.shuffle(todo)
        runs.disturb(todo, table)
        problems += runs.problems
        if runs.mounted:
            subprocess.run(["umount", runs.disk], check=True)
    for (name, what, saving), times in sorted(table.items()):
        print(f"| {name} | {what} | {'saving or exporting' if saving else 'any moment'} | {times} |")
    kills = [(saving, times) for (_, what, saving), times in table.items() if what not in FAULTS]
    print(
        f"{sum(n for _, n in kills)} kills, {sum(n for saving, n in kills if saving)} while saving or exporting; {len(problems)} problems"
    )
    sys.exit("\n".join(problems) or None)


if __name__ == "__main__":
    main()

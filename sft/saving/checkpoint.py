"""Write checkpoints that are whole or absent, and tell whether one still is.

It is written under `output_dir/incomplete/`, synced to the disk, given a `manifest.json` (step, sizes, hashes, what kind of
run made it) as its last file, and only then renamed to `output_dir/checkpoint-N`. Older ones are removed after that.
"""

import hashlib
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist
from filelock import FileLock, Timeout

from sft.job import UserError, complain, gather, rank, say, swapped, sync, world_size
from sft.launchers import local_rank
from sft.outside import read_object

MANIFEST = "manifest.json"
INCOMPLETE = "incomplete"  # folder in output_dir for checkpoints that are being written; safe to delete
OF_STATE: dict[str, Any] = {
    "log_history": list,
    "stateful_callbacks": dict,
    "total_flos": int | float,
    "best_metric": int | float | None,
}
PIECE_BYTES = 64 * 2**20  # a file is hashed in pieces, so that many threads hash one file of 28 GB


def _my_share(names: list[str]) -> list[str]:
    """The names that this rank reads, of a list that is the same on all ranks."""
    return names[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else names


def step_of(folder: Path) -> int:
    """checkpoint-12 -> 12, anything else -> -1."""
    number = folder.name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() and number != folder.name and folder.is_dir() else -1


def newest_first(output_dir: str | Path) -> list[Path]:
    """The folders of output_dir that are named like a checkpoint, whole or not, highest step first."""
    found = Path(output_dir).glob("checkpoint-*")
    return sorted((folder for folder in found if step_of(folder) >= 0), key=step_of, reverse=True)


def digest(path: Path) -> str:
    """SHA-256 over the SHA-256 of each 64 MiB piece of a file, in threads (hashlib releases the GIL)."""

    def piece(offset: int) -> bytes:
        with open(path, "rb") as file:
            file.seek(offset)
            return hashlib.sha256(file.read(PIECE_BYTES)).digest()

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        pieces = pool.map(piece, range(0, path.stat().st_size, PIECE_BYTES))
        return hashlib.sha256(b"".join(pieces)).hexdigest()


def describe_file(path: Path) -> dict[str, Any]:
    """A file's entry in a manifest."""
    return {"bytes": path.stat().st_size, "sha256": digest(path)}


def files_in(folder: Path) -> dict[str, int]:
    """Relative names of all files below a folder except the manifest, with their bytes, the largest first."""
    sizes = {f.relative_to(folder).as_posix(): f.stat().st_size for f in sorted(folder.rglob("*")) if f.is_file()}
    return dict(sorted((file for file in sizes.items() if file[0] != MANIFEST), key=lambda file: -file[1]))


def write_json(path: Path, value: dict) -> None:
    """Replace a JSON file by a whole one that is on the disk."""
    new = path.with_name(f".{path.name}.new")
    with open(new, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.write("\n")
    sync(new)
    os.replace(new, path)
    sync(path.parent)


def why_not_whole(folder: Path, manifest: str = MANIFEST) -> str | None:
    """Why a folder's files are not those that its manifest lists, or None when they are.

    All ranks together: each hashes its share of the files and all get the same answer.
    """
    return next((problem for problem in gather(_problem_here(folder, manifest)) if problem), None)


def _problem_here(folder: Path, name: str) -> str | None:
    try:
        manifest = read_object(folder / name)
        step = int(manifest["step"])
        if "bytes" in manifest:  # a COMPLETE.json of 2026-11 and before: sizes alone
            manifest["files"] = {file: {"bytes": size, "sha256": None} for file, size in manifest["bytes"].items()}
        files = {file: (int(entry["bytes"]), entry["sha256"]) for file, entry in manifest["files"].items()}
        if not files or not isinstance(manifest.get("run", {}), dict):
            raise ValueError
    except FileNotFoundError:
        return f"it has no {name}, so it was never finished (or another program wrote it)"
    except (ValueError, KeyError, TypeError, AttributeError, OSError, OverflowError) as error:
        return f"its {name} is damaged ({type(error).__name__})"
    home = folder.resolve()
    for file, (size, _) in files.items():
        path = (home / file).resolve()
        if not path.is_relative_to(home):
            return f"its {name} names a file outside of it: {file!r}"
        if not path.is_file():
            return f"{file} is missing"
        if path.stat().st_size != size:
            return f"{file} has {path.stat().st_size:,} of {size:,} bytes"
    if step_of(folder) not in (-1, step):
        return f"its {name} is of step {step}"
    if name == MANIFEST and "scaler.pt" not in files and os.path.lexists(home / "scaler.pt"):
        # the Trainer would load it
        return f"it holds a scaler.pt that its {name} does not list"
    for file in sorted(files):  # the stock Trainer and transformers read them as they are
        try:
            held = read_object(home / file) if file.endswith(".json") else {}
        except (OSError, ValueError) as error:
            return f"its {file} is damaged ({error})"
        if file == "trainer_state.json" and held.get("global_step") != step:
            return f"its {file} is of step {held.get('global_step')}"
        if file == "trainer_state.json" and any(not isinstance(held.get(key), kind) for key, kind in OF_STATE.items()):
            return f"its {file} is damaged (not each of {', '.join(OF_STATE)} is what it should be)"
    for file in _my_share(sorted(files, key=lambda file: -files[file][0])):
        if files[file][1] is not None and digest(home / file) != files[file][1]:
            return f"{file} does not have the hash that it was saved with: its bytes have changed"
    return None


def save_whole(trainer, identity: dict[str, str], write: Callable[[], None]) -> None:
    """Write checkpoint-N so that it is whole or absent; all ranks together.

    Args:
        identity: what kind of run this is, from `resume.run_identity`.
        write: the Trainer's own saving, which writes to `args.output_dir/checkpoint-N`.
    """
    args, step, output_dir = trainer.args, trainer.state.global_step, Path(trainer.args.output_dir)
    final, incomplete = output_dir / f"checkpoint-{step}", output_dir / INCOMPLETE
    staged = incomplete / final.name
    if too_little_space(output_dir, step):
        return
    with exit_on_failed_save(final):
        if rank() == 0:
            shutil.rmtree(incomplete, ignore_errors=True)
            incomplete.mkdir(parents=True)
        gather(None)
        # the Trainer pickles its arguments, the hub's token among them, into a file that nothing reads (5.17 and 5.23)
        with swapped(args, output_dir=str(incomplete), save_total_limit=None, push_to_hub=False, hub_token=None):
            write()
        if args.should_save:
            (staged / "training_args.bin").unlink(missing_ok=True)
            make_readable(staged)
        gather(None)  # before that, files come and go under the names of others
        best = trainer.state.best_global_step
        if best is not None:  # the best checkpoint is named as it will be called, in memory and in the saved state
            there = best == step or (output_dir / f"checkpoint-{best}").is_dir()
            trainer.state.best_model_checkpoint = str(output_dir / f"checkpoint-{best}") if there else None
            if args.should_save:
                trainer.state.save_to_json(str(staged / "trainer_state.json"))
        if local_rank() == 0:  # on each machine: over NFS one can only flush its own files
            sync(*staged.rglob("*"), staged, incomplete)
        gather(None)
        files = _describe_files(staged, resumable=not args.save_only_model)
        if rank() == 0:
            manifest = {"step": step, "world_size": world_size(), "files": files, "run": identity}
            write_json(staged / MANIFEST, manifest)
            if final.exists():  # damaged
                os.rename(final, incomplete / "replaced")
            os.rename(staged, final)
            sync(output_dir)
            shutil.rmtree(incomplete)
            rotate(output_dir, final, args.save_total_limit, trainer.state.best_model_checkpoint)
        gather(None)
    if args.push_to_hub:
        trainer._push_from_checkpoint(str(final))


def make_readable(folder: Path) -> None:
    """Give weights the mode of the other files: safetensors (0.8) creates its own readable by the owner alone."""
    for other in [*folder.glob("*.json")][:1]:
        for file in folder.glob("*.safetensors"):
            file.chmod(other.stat().st_mode & 0o777)


@contextmanager
def exit_on_failed_save(final: Path) -> Iterator[None]:
    """Turn a failed save into one message, with the reason and what is left to continue from, and exit code 2.

    The rank that failed prints it: the others may be waiting for it inside a collective, and torchrun ends them.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        kept = next((folder for folder in newest_first(final.parent) if (folder / MANIFEST).is_file()), None)
        what, left = final.name, "No earlier checkpoint exists."
        if final.parent.parent.name == INCOMPLETE:
            what, left = "trial save: a checkpoint", "No step was taken. Mend the cause and start again."
        elif kept:
            left = f"{kept.name} is untouched: mend the cause and continue with --resume_from_checkpoint True."
        there = next(folder for folder in final.absolute().parents if folder.is_dir())
        free = f"{there} has {shutil.disk_usage(there).free / 1e9:.2f} GB free"
        reason = f"{what} could not be saved (rank {rank()}): {type(error).__name__}: {error}"
        complain(f"error: {reason}\n  {free}. {left}")
        if rank() == 0:
            shutil.rmtree(final.parent / INCOMPLETE, ignore_errors=True)  # room on a full disk
        raise SystemExit(2) from error


def hold_output_dir(output_dir: str) -> FileLock | None:
    """Lock the output folder for this run (rank 0): a second run would remove the files that this one is writing.

    The kernel lets go of the lock when its process ends, also by SIGKILL. Raises UserError with who holds it.
    """
    if rank() != 0:
        return None
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    # one object for each folder and process, which may take it again: tests train twice in one process
    lock, owner = FileLock(folder / ".run.lock", timeout=0, is_singleton=True), folder / ".run"
    try:
        lock.acquire()
        started = time.strftime("%Y-%m-%d %H:%M:%S")
        owner.write_text(f"host {socket.gethostname()}, process {os.getpid()}, since {started}\n", "utf-8")
    except Timeout:
        who = owner.read_text("utf-8", "replace") if owner.is_file() else "another process"
        raise UserError(
            f"{output_dir}: another run writes there ({who.strip()}). Wait for it, or name another --output_dir."
        ) from None
    except OSError as error:
        raise UserError(
            f"{output_dir}: no lock can be set there ({error}). Mend that, or name another --output_dir."
        ) from None
    return lock


def too_little_space(output_dir: Path, step: int) -> bool:
    """Whether the disk has no room for a checkpoint as large as the last one. Warns if so; the run goes on."""
    before = next(iter(newest_first(output_dir)), None)
    needed = sum(files_in(before).values()) if before else 0
    free = shutil.disk_usage(output_dir).free if output_dir.is_dir() else needed
    full = gather(free < needed)[0]
    if full and before:
        room = f"it needs {needed / 1e9:.3f} GB and {output_dir} has {free / 1e9:.3f} GB free"
        left = f"{before.name} is untouched and training goes on"
        say(f"warning: checkpoint-{step} was not saved: {room}. {left}. Make room before the next save.")
    return full


def missing_parts(names: list[str], ranks: int) -> list[str]:
    """Which parts a checkpoint of `ranks` processes lacks, given its files' names: of the run, and of each rank."""
    parts = [r"trainer_state\.json", "model|pytorch_model|adapter_model|global_step"]
    parts += ["rng_state.pth"] if ranks == 1 else [f"rng_state_{index}.pth" for index in range(ranks)]
    if any(name.startswith("global_step") for name in names):  # DeepSpeed's own layout
        parts += [rf"global_step\d+/.*pp_rank_{index}_.*optim_states\.pt" for index in range(ranks)]
    else:
        parts += ["optimizer", r"scheduler\.pt"]
    return [part for part in parts if not any(re.match(part, name) for name in names)]


def _describe_files(staged: Path, resumable: bool) -> dict[str, dict]:
    """The manifest's entries of a staged checkpoint; raise when a part is missing. All ranks hash a share."""
    names = gather(list(files_in(staged)))[0]
    problems = [f"it has no {part}" for part in missing_parts(names, world_size())] if resumable else []
    mine = [name for name in _my_share(names) if (staged / name).is_file()]
    if len(mine) < len(_my_share(names)):
        problems.append("its files are not visible on every machine: --output_dir must be on a disk that they share")
    shares = gather((problems, {} if problems else {name: describe_file(staged / name) for name in mine}))
    if any(found for found, _ in shares):
        raise RuntimeError("; ".join(sorted({problem for found, _ in shares for problem in found})))
    return dict(sorted((name, entry) for _, share in shares for name, entry in share.items()))


def rotate(output_dir: Path, newest: Path, limit: int | None, best: str | None) -> None:
    """Remove the oldest checkpoints until `limit` remain; never `newest` (just proved whole) nor the best one.

    Each is renamed into `incomplete/` first, so that a kill in the middle leaves nothing that looks like a checkpoint.
    """
    others = [folder for folder in newest_first(output_dir) if folder != newest]
    removable = [folder for folder in others if not best or folder.name != Path(best).name]
    kept = limit - 1 - len(others) + len(removable) if limit and limit > 0 else len(others)
    for folder in removable[max(0, kept) :]:
        doomed = output_dir / INCOMPLETE / "removed"
        doomed.parent.mkdir(exist_ok=True)
        os.rename(folder, doomed)
        shutil.rmtree(doomed.parent)

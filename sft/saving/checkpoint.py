"""Write checkpoints that are whole or absent, and tell whether one still is.

A checkpoint is written under `output_dir/incomplete/`, synced to the disk, given a `manifest.json` (step, sizes, hashes, what
kind of run made it) as its last file, and only then renamed to `output_dir/checkpoint-N`. Older ones are removed after that.
A folder named `checkpoint-N` is therefore complete unless it was damaged later, which the hashes reveal.
"""

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from sft.job import UserError, local_rank, rank, say, swapped, sync, world_size

MANIFEST = "manifest.json"
INCOMPLETE = "incomplete"  # folder in output_dir for checkpoints that are being written; safe to delete
PIECE_BYTES = 64 * 2**20  # a file is hashed in pieces, so that many threads hash one file of 28 GB


def gather(value) -> list:
    """The value of every rank, in rank order; `[value]` without torch.distributed."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _my_share(names: list[str]) -> list[str]:
    """The names that this rank reads, of a list that is the same on all ranks."""
    return names[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else names


def step_of(folder: Path) -> int:
    """checkpoint-12 -> 12, anything else -> -1."""
    match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
    return int(match[1]) if match and folder.is_dir() else -1


def newest_first(output_dir: str | Path) -> list[Path]:
    """The folders of output_dir that are named like a checkpoint, whole or not, highest step first."""
    folder = Path(output_dir)
    return sorted((f for f in folder.glob("checkpoint-*") if step_of(f) >= 0), key=step_of, reverse=True)


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


def files_in(folder: Path) -> list[str]:
    """Relative names of all files below a folder except the manifest, the largest first."""
    files = [f for f in folder.rglob("*") if f.is_file() and f.name != MANIFEST]
    return [f.relative_to(folder).as_posix() for f in sorted(files, key=lambda f: (-f.stat().st_size, f))]


def write_json(path: Path, value: dict) -> None:
    """Replace a JSON file by a whole one that is on the disk."""
    new = path.with_name(f".{path.name}.new")
    with open(new, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.write("\n")
    sync(new)
    os.replace(new, path)
    sync(path.parent)


# ---- reading


def why_not_whole(folder: Path, manifest: str = MANIFEST) -> str | None:
    """Why a folder's files are not those that its manifest lists, or None when they are.

    Called by all ranks together: each hashes its share of the files and all get the same answer.
    """
    return next((problem for problem in gather(_problem_here(folder, manifest)) if problem), None)


def _problem_here(folder: Path, name: str) -> str | None:
    try:
        manifest = json.loads((folder / name).read_text("utf-8"))
        step, entries = int(manifest["step"]), manifest.get("files")
        if entries is None:  # a COMPLETE.json of 2026-11 and before: sizes alone
            entries = {file: {"bytes": size, "sha256": None} for file, size in manifest["bytes"].items()}
        files = {file: (int(entry["bytes"]), entry["sha256"]) for file, entry in entries.items()}
        if not files or not isinstance(manifest.get("run", {}), dict):
            raise ValueError
    except FileNotFoundError:
        return f"it has no {name}, so it was never finished (or another program wrote it)"
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        return f"its {name} is damaged ({type(error).__name__})"
    home = folder.resolve()
    for file, (size, _) in files.items():
        if not (home / file).resolve().is_relative_to(home):
            return f"its {name} names a file outside of it: {file!r}"
        if not (home / file).is_file():
            return f"{file} is missing"
        if (home / file).stat().st_size != size:
            return f"{file} has {(home / file).stat().st_size:,} of {size:,} bytes"
    if step_of(folder) not in (-1, step):
        return f"its {name} is of step {step}"
    for file in _my_share(sorted(files, key=lambda file: -files[file][0])):
        if files[file][1] is not None and digest(home / file) != files[file][1]:
            return f"{file} does not have the hash that it was saved with: its bytes have changed"
    return None


# ---- writing


def save_whole(trainer, identity: dict[str, str], write: Callable[[], None]) -> None:
    """Write checkpoint-N so that it is whole or absent; all ranks call it together.

    Args:
        trainer: the Trainer whose state is saved.
        identity: what kind of run this is, from `resume.run_identity`.
        write: the Trainer's own saving, which writes to `args.output_dir/checkpoint-N`.
    """
    args, step = trainer.args, trainer.state.global_step
    output_dir = Path(args.output_dir)
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
        gather(None)  # before that, files come and go under the names of others
        _move_best_checkpoint(trainer, staged, output_dir)
        if local_rank() == 0:  # on each machine: over NFS one can only flush its own files
            sync(*staged.rglob("*"), staged, incomplete)
        gather(None)
        files = _describe_files(staged, resumable=not args.save_only_model)
        if rank() == 0:
            manifest = {"step": step, "world_size": world_size(), "files": files, "run": identity}
            write_json(staged / MANIFEST, manifest)
            _put_in_place(staged, final, incomplete)
            rotate(output_dir, final, args.save_total_limit, trainer.state.best_model_checkpoint)
        gather(None)
    if args.push_to_hub:
        trainer._push_from_checkpoint(str(final))


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
            what, left = "save rehearsal: a checkpoint", "No step was taken. Mend the cause and start again."
        elif kept:
            left = f"{kept.name} is untouched: mend the cause and continue with --resume_from_checkpoint True."
        there = next(folder for folder in final.absolute().parents if folder.is_dir())
        reason = f"error: {what} could not be saved (rank {rank()}): {type(error).__name__}: {error}"
        free = f"{there} has {shutil.disk_usage(there).free / 1e9:.2f} GB free"
        print(f"{reason}\n  {free}. {left}", file=sys.stderr, flush=True)
        if rank() == 0:
            shutil.rmtree(final.parent / INCOMPLETE, ignore_errors=True)  # room on a full disk
        raise SystemExit(2) from error


def too_little_space(output_dir: Path, step: int) -> bool:
    """Whether the disk has no room for a checkpoint as large as the last one. Warns if so; the run goes on."""
    before = next(iter(newest_first(output_dir)), None)
    needed = sum((before / name).stat().st_size for name in files_in(before)) if before else 0
    free = shutil.disk_usage(output_dir).free if output_dir.is_dir() else needed
    full = gather(free < needed)[0]
    if full and before:
        room = f"it needs {needed / 1e9:.3f} GB and {output_dir} has {free / 1e9:.3f} GB free"
        left = f"{before.name} is untouched and training goes on. Make room before the next save."
        say(f"warning: checkpoint-{step} was not saved: {room}. {left}")
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
    """The manifest's entries of a staged checkpoint; raises when a part is missing. All ranks hash a share."""
    names = gather(files_in(staged))[0]
    problems = [f"it has no {part}" for part in missing_parts(names, world_size())] if resumable else []
    elsewhere = "is not visible on every machine: --output_dir must be on a disk that they share"
    problems += [f"{name} {elsewhere}" for name in _my_share(names) if not (staged / name).is_file()]
    mine = {} if problems else {name: describe_file(staged / name) for name in _my_share(names)}
    shares = gather((mine, problems))
    problems = sorted({problem for _, found in shares for problem in found})
    if problems:
        raise RuntimeError("; ".join(problems))
    return dict(sorted((name, entry) for share, _ in shares for name, entry in share.items()))


def _move_best_checkpoint(trainer, staged: Path, output_dir: Path) -> None:
    """Name the best checkpoint as it will be called, in memory and in the saved state."""
    best = trainer.state.best_global_step
    if best is None:
        return
    folder = output_dir / f"checkpoint-{best}"
    trainer.state.best_model_checkpoint = str(folder) if folder.is_dir() or staged.name == folder.name else None
    if trainer.args.should_save:
        trainer.state.save_to_json(str(staged / "trainer_state.json"))


def _put_in_place(staged: Path, final: Path, incomplete: Path) -> None:
    """Rename a whole checkpoint to its final name; a damaged one of that name goes."""
    if final.exists():
        os.rename(final, incomplete / "replaced")
    os.rename(staged, final)
    sync(final.parent)
    shutil.rmtree(incomplete)


def rotate(output_dir: Path, newest: Path, limit: int | None, best: str | None) -> None:
    """Remove the oldest checkpoints until `limit` remain; never `newest` (just proved whole) nor the best one.

    Each is renamed into `incomplete/` first, so that a kill in the middle leaves nothing that looks like a checkpoint.
    """
    if limit is None or limit <= 0:
        return
    others = [folder for folder in newest_first(output_dir) if folder != newest]
    protected = [folder for folder in others if best and folder.name == Path(best).name]
    removable = [folder for folder in others if folder not in protected]
    for folder in removable[max(0, limit - 1 - len(protected)) :]:
        doomed = output_dir / INCOMPLETE / "removed"
        doomed.parent.mkdir(exist_ok=True)
        os.rename(folder, doomed)
        shutil.rmtree(doomed.parent)

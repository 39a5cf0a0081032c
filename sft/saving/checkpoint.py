"""Whole checkpoints.

A checkpoint is written under `output_dir/incomplete/`, synced to the disk, checked, given a `manifest.json` (step, sizes,
hashes, what kind of run made it) as its last file, and only then renamed to `output_dir/checkpoint-N`. Older ones are
removed after that. A folder named `checkpoint-N` is therefore complete, unless it was damaged later, which the hashes reveal.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from sft.job import UserError, local_rank, rank, say, world_size

MANIFEST = "manifest.json"


INCOMPLETE = "incomplete"  # folder in output_dir for checkpoints that are being written; safe to delete


NOT_SHARED = "not visible on every machine: --output_dir must be on a disk that they share"


PIECE_BYTES = 64 * 2**20  # a file is hashed in pieces, so that one 28 GB file is hashed by many threads


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


def files_in(folder: Path) -> list[str]:
    """Relative names of all files below a folder except the manifest, the largest first."""
    files = [f for f in folder.rglob("*") if f.is_file() and f.name != MANIFEST]
    return [f.relative_to(folder).as_posix() for f in sorted(files, key=lambda f: (-f.stat().st_size, f))]


def damage(path: Path) -> str | None:
    """Why a file cannot be what its name says, from its structure alone; None when it looks sound."""
    if path.suffix == ".safetensors":
        with open(path, "rb") as file:
            try:
                header_bytes = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(header_bytes)) if header_bytes < 100 * 2**20 else {}
                ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            except (ValueError, KeyError, TypeError, AttributeError):
                return "its header is damaged"
        expected = 8 + header_bytes + max(ends, default=0)
        return None if path.stat().st_size == expected and ends else f"{path.stat().st_size:,} of {expected:,} bytes"
    if path.suffix == ".json":
        try:
            json.loads(path.read_text("utf-8"))
        except ValueError:
            return "it is not valid JSON"
    if path.suffix in (".pt", ".pth", ".bin") and not zipfile.is_zipfile(path):
        with open(path, "rb") as file:  # DeepSpeed writes torch's older format: one pickle after another
            if file.read(1) != b"\x80":
                return "torch.save did not finish it"
    return None


def missing_parts(names: list[str], ranks: int) -> list[str]:
    """What a checkpoint of `ranks` processes lacks, given the relative names of its files."""
    rng = ["rng_state.pth"] if ranks == 1 else [f"rng_state_{rank}.pth" for rank in range(ranks)]
    missing = [name for name in ["trainer_state.json", *rng] if name not in names]
    sharded = [name for name in names if name.startswith("global_step")]  # DeepSpeed: global_stepN/*zero_pp_rank_R_*
    if sharded:
        states = [name for name in sharded if name.endswith("optim_states.pt")]
        missing += [
            f"optimizer states of rank {r}" for r in range(ranks) if not any(f"pp_rank_{r}_" in name for name in states)
        ]
    else:
        has_optimizer = any(name.startswith(("optimizer.", "optimizer_")) for name in names)
        missing += [] if has_optimizer else ["the optimizer's state"]
        missing += [] if "scheduler.pt" in names else ["scheduler.pt"]
    shards = {name.split("/")[0] for name in names if name.endswith(".distcp")}  # torch.distributed.checkpoint (FSDP)
    missing += [f"{folder}/.metadata" for folder in sorted(shards) if f"{folder}/.metadata" not in names]
    weights = ("model", "pytorch_model", "adapter_model", "global_step")
    missing += [] if any(name.startswith(weights) for name in names) else ["the weights"]
    return missing


def why_not_whole(folder: Path) -> str | None:
    """Why a checkpoint cannot be resumed from, or None when it is whole.

    Called by all ranks together: each hashes its share of the files and all get the same answer.
    """
    return next((problem for problem in gather(_problem_here(folder)) if problem), None)


def _problem_here(folder: Path) -> str | None:
    try:
        manifest = json.loads((folder / MANIFEST).read_text("utf-8"))
        files = {name: (entry["bytes"], entry["sha256"]) for name, entry in manifest["files"].items()}
        step, ranks = int(manifest["step"]), int(manifest["world_size"])
    except FileNotFoundError:
        return f"it has no {MANIFEST}, so it was never finished (or another program wrote it)"
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        return f"its {MANIFEST} is damaged ({type(error).__name__})"
    home = folder.resolve()
    for name, (size, _) in files.items():
        if not (home / name).resolve().is_relative_to(home):
            return f"its {MANIFEST} names a file outside of it: {name!r}"
        if not (home / name).is_file():
            return f"{name} is missing"
        if (home / name).stat().st_size != size:
            return f"{name} has {(home / name).stat().st_size:,} of {size:,} bytes"
    missing = missing_parts(list(files), ranks)
    if missing:
        return f"its {MANIFEST} does not list {', '.join(missing)}"
    if step != step_of(folder):
        return f"its {MANIFEST} is of step {step}"
    for name in _my_share(sorted(files, key=lambda name: -files[name][0])):
        if digest(home / name) != files[name][1]:
            return f"{name} does not have the hash that it was saved with: its bytes have changed"
    return None


def save_whole(trainer, run: dict[str, str], write: Callable[[], None]) -> None:
    """Write checkpoint-N so that it is whole or absent; all ranks call it together.

    Args:
        trainer: the Trainer whose state is saved.
        run: what kind of run this is, for `run_of`.
        write: the Trainer's own saving, which writes to `args.output_dir/checkpoint-N`.
    """
    args, step = trainer.args, trainer.state.global_step
    output_dir = Path(args.output_dir)
    final = output_dir / f"checkpoint-{step}"
    if too_little_space(output_dir, step):
        return
    incomplete = output_dir / INCOMPLETE
    with exit_on_failed_save(final):
        if rank() == 0:
            shutil.rmtree(incomplete, ignore_errors=True)
            incomplete.mkdir(parents=True)
        gather(None)
        with writing_into(trainer, incomplete):
            write()
        staged = incomplete / final.name
        gather(None)  # before that, files come and go under the names of others
        _move_best_checkpoint(trainer, staged, output_dir)
        if local_rank() == 0:
            sync(staged)  # on each machine: over NFS one can only flush its own files
        gather(None)
        manifest = describe_files(staged, step, run, resumable=not args.save_only_model)
        if rank() == 0:
            write_json(staged / MANIFEST, manifest)
            sync(staged)
            _put_in_place(staged, final, incomplete)
            rotate(output_dir, final, args.save_total_limit, trainer.state.best_model_checkpoint)
        gather(None)
    if args.push_to_hub:
        trainer._push_from_checkpoint(str(final))


@contextmanager
def writing_into(trainer, folder: Path) -> Iterator[None]:
    """The Trainer saves below `folder`, removes nothing and uploads nothing."""
    args = trainer.args
    kept = {name: getattr(args, name) for name in ("output_dir", "save_total_limit", "push_to_hub")}
    args.output_dir, args.save_total_limit, args.push_to_hub = str(folder), None, False
    try:
        yield
    finally:
        for name, value in kept.items():
            setattr(args, name, value)


@contextmanager
def exit_on_failed_save(final: Path) -> Iterator[None]:
    """A failed save ends the job with the reason and with what is still there to continue from.

    The rank that failed speaks for itself: the others may be waiting for it inside a collective, and torchrun ends them.
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
        print(
            f"error: {what} could not be saved (rank {rank()}): {type(error).__name__}: {error}\n"
            f"  {there} has {shutil.disk_usage(there).free / 1e9:.2f} GB free. {left}",
            file=sys.stderr,
            flush=True,
        )
        if rank() == 0:
            shutil.rmtree(final.parent / INCOMPLETE, ignore_errors=True)  # room on a full disk
        raise SystemExit(2) from error


def too_little_space(output_dir: Path, step: int) -> bool:
    """Whether the disk has no room for a checkpoint as large as the last one; then says so, and the run goes on."""
    before = next(iter(newest_first(output_dir)), None)
    needed = sum((before / name).stat().st_size for name in files_in(before)) if before else 0
    free = shutil.disk_usage(output_dir).free if output_dir.is_dir() else needed
    full = gather(free < needed)[0]
    if full and before:
        say(
            f"warning: checkpoint-{step} was not saved: it needs {needed / 1e9:.3f} GB and {output_dir} has {free / 1e9:.3f} GB free. "
            f"{before.name} is untouched and training goes on. Make room before the next save."
        )
    return full


def sync(folder: Path) -> None:
    """Flush the files of a folder, and the folders, to the disk."""
    for path in [*folder.rglob("*"), folder, folder.parent]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def describe_files(staged: Path, step: int, run: dict[str, str], resumable: bool) -> dict:
    """The manifest of a staged checkpoint; raises when a part is missing or damaged. All ranks hash a share."""
    names = gather(files_in(staged))[0]
    problems = [f"{name} is missing" for name in missing_parts(names, world_size())] if resumable else []
    mine = {}
    for name in _my_share(names):
        problem = damage(staged / name) if (staged / name).is_file() else NOT_SHARED
        problems += [f"{name}: {problem}"] if problem else []
        mine[name] = {} if problem else {"bytes": (staged / name).stat().st_size, "sha256": digest(staged / name)}
    shares = gather((mine, problems))
    problems = sorted({problem for _, found in shares for problem in found})
    if problems:
        raise RuntimeError("; ".join(problems))
    files = {name: entry for share, _ in shares for name, entry in share.items()}
    return {"step": step, "world_size": world_size(), "files": dict(sorted(files.items())), "run": run}


def write_json(path: Path, value: dict) -> None:
    """Write a JSON file and flush it to the disk."""
    with open(path, "w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def _move_best_checkpoint(trainer, staged: Path, output_dir: Path) -> None:
    """`best_model_checkpoint` names the folder as it will be called, in memory and in the saved state."""
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
    sync_folder = os.open(final.parent, os.O_RDONLY)
    os.fsync(sync_folder)
    os.close(sync_folder)
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

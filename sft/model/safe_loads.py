"""Load files without running code that is in them.

Torch's files are pickles, and a pickle runs what it names. Models come as safetensors, or through torch's weights-only
loader; this file handles the states of a resumed checkpoint, which several libraries load, each in its own way.
"""

import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.distributed.checkpoint.api import CheckpointException

from sft.job import UserError

SWITCH = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
DCP, METADATA = "torch.distributed.checkpoint.", "Metadata MetadataIndex StorageMeta TensorProperties"
METADATA += " TensorStorageMetadata BytesStorageMetadata ChunkStorageMetadata _MEM_FORMAT_ENCODING"
METADATA_NAMES = {  # what `.metadata` names: classes without code that runs when they are built
    *(f"{DCP}metadata.{name}" for name in METADATA.split()),
    *(DCP + "filesystem._StorageInfo", "torch.serialization._get_layout", "torch.Size", "collections.OrderedDict"),
    *("pathlib.PosixPath", "pathlib._local.PosixPath"),
}


class _MetadataOnly(pickle.Unpickler):
    """Reads the pickle that torch.distributed.checkpoint calls `.metadata`, and nothing that runs code."""

    def find_class(self, module: str, name: str):
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if f"{module}.{name}" in METADATA_NAMES or is_dtype:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def check_metadata(checkpoint: Path) -> None:
    """Refuse a sharded checkpoint whose `.metadata` could run code: torch 2.13 reads it with a plain `pickle.load`."""
    for path in sorted(checkpoint.rglob(".metadata")):
        try:
            with open(path, "rb") as file:
                _MetadataOnly(file).load()
        except (pickle.UnpicklingError, EOFError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is not a checkpoint's metadata and was not loaded: {error}.") from error


@contextmanager
def safe_loads(source: str | None, deepspeed: bool) -> Iterator[None]:
    """Inside, torch.load runs no code from any file, whichever library calls it.

    DeepSpeed (0.19) and torch's sharded checkpoints (2.13) load with weights_only=False; torch's own switch overrules
    that. What DeepSpeed stores besides tensors is allowed by name. `source` is the model or the checkpoint that is loaded.
    """
    allowed = []
    if deepspeed:
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address

        allowed = [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]
    if source:
        check_metadata(Path(source))
    before = {SWITCH: os.environ[SWITCH]} if SWITCH in os.environ else {}
    os.environ[SWITCH] = "1"
    try:
        with torch.serialization.safe_globals(allowed):
            yield
    except (pickle.UnpicklingError, CheckpointException) as error:
        failures = [failure for failure, _ in getattr(error, "failures", {}).values()] or [error]
        refused = [str(failure) for failure in failures if isinstance(failure, pickle.UnpicklingError)]
        if not refused:
            raise
        reason = refused[0].rsplit("WeightsUnpickler error:", 1)[-1].strip().splitlines()[0]
        raise UserError(f"{source}: one of its files was not loaded, because it could run code. {reason}") from error
    finally:
        del os.environ[SWITCH]
        os.environ.update(before)

"""A checkpoint judged by the headers of its files: every weight of the model is there, with its shape, and none is left over.

What is missing, transformers (5.23) fills in at random, with a warning that scrolls by.
"""

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import load_state_dict

from sft.job import UserError
from sft.model.safe_loads import safe_loads
from sft.outside import counted

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # what transformers looks for, in this order
AGAIN = "Download the model again."
POINTER = b"version https://git-lfs"


def header_problems(flags: Any, config: PreTrainedConfig, model: PreTrainedModel) -> list[str]:
    """What is wrong with a checkpoint's files, and between them and the model; nothing for one that is still to be downloaded.

    Args:
        flags: the fields of ModelArguments.
        model: of the config, on the meta device.
    """
    name, folder = flags.model_name_or_path, Path(flags.model_name_or_path)
    on_hub = not folder.is_dir()
    if on_hub:
        cached = try_to_load_from_cache(name, "config.json", flags.cache_dir)
        folder = Path(cached).parent if isinstance(cached, str) else folder
    try:
        files = weight_files(folder)
    except (ValueError, KeyError) as error:
        return [f"{folder}: the index of its weights is damaged ({type(error).__name__}: {error}). {AGAIN}"]
    missing = [file for file in files if not file.is_file()]
    if on_hub and (missing or not files):
        return []
    if not files:
        return [f"{name}: {_other_weights(folder)}"]
    if missing:
        return [
            f"{name}: {len(missing)} of its {len(files)} files of weights are missing, such as {missing[0].name}. {AGAIN}"
        ]
    weights: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            with safe_loads(str(folder), deepspeed=False):  # a .bin file is mapped, not read
                weights |= load_state_dict(file, map_location="meta" if file.suffix == ".safetensors" else "cpu")
        except UserError as error:
            return error.problems
        except (SafetensorError, RuntimeError, ValueError, EOFError, OSError) as error:
            return [f"{file} is damaged, or half of a file ({str(error).splitlines()[0]}). {AGAIN}"]
    shapes = {key: torch.empty(weight.shape, device="meta") for key, weight in weights.items()}
    return differences(name, compare(model, config, shapes), flags.allow_new_weights)


def pointer_problems(folder: Path) -> list[str]:
    """Git LFS pointers in the place of weights, an index or a tokenizer: what a clone without `git lfs` leaves."""
    pointers = []
    for file in sorted(folder.iterdir()) if folder.is_dir() else ():
        if file.is_file():
            with open(file, "rb") as opened:
                pointers += [file] * (opened.read(len(POINTER)) == POINTER)
    more = f" ({counted(len(pointers), 'file')} in all)" if len(pointers) > 1 else ""
    return [
        f"{file} is a Git LFS pointer, not the file{more}. Run `git lfs pull` in its folder." for file in pointers[:1]
    ]


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers would read a checkpoint's weights from; those that an index lists may be missing."""
    for name in WEIGHTS:
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [folder / name]
        if index.is_file():
            return [folder / file for file in sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))]
    return []


def _other_weights(folder: Path) -> str:
    if any(folder.glob("consolidated*")):
        return (
            "its weights are in the maker's own format (consolidated.*), which transformers does not read. Download the files named "
            "model*.safetensors too, or convert these."
        )
    return "a config.json but no weights (model.safetensors). Download the model completely."


def compare(model: PreTrainedModel, config: PreTrainedConfig, weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    """What transformers would miss, leave over or find in another shape (`output_loading_info`), on the meta device.

    It knows which names change when a model is loaded, and which weights are tied.
    """
    options: dict[str, Any] = {"device_map": "meta", "dtype": torch.float32, "ignore_mismatched_sizes": True}
    with quiet():
        config, make = copy.deepcopy(config), type(model).from_pretrained
        return make(None, config=config, state_dict=weights, output_loading_info=True, **options)[1]


def differences(name: str, found: dict[str, Any], allow_new: str | None) -> list[str]:
    """Problems of `output_loading_info`: no weight is trained from random numbers unless `--allow_new_weights` names it."""
    allowed = {key.strip() for key in (allow_new or "").split(",")} - {""}
    missing, unexpected = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    new, stray = [key for key in missing if key not in allowed], sorted(allowed - set(missing))
    problems = []
    if stray:
        lacks = f" It lacks {', '.join(missing[:3])}." if missing else ""
        problems.append(f"--allow_new_weights {','.join(stray)}: the checkpoint lacks no weight of that name.{lacks}")
    if new:
        others = (
            f" It has {len(unexpected)} that the model does not know, such as {unexpected[0]}." if unexpected else ""
        )
        if any(key.startswith("_orig_mod.") for key in unexpected):  # the name that torch.compile gives
            others += " torch.compile put _orig_mod. before their names: save the model without it, or remove that from the names."
        problems.append(
            f"{name}: {len(new)} of the model's weights are not in the checkpoint, such as {new[0]}; they would be trained from random "
            f"numbers.{others} Take a checkpoint that is complete. To train new ones: --allow_new_weights {','.join(new) if len(new) < 4 else 'NAME,NAME'}"
        )
    elif unexpected:
        problems.append(
            f"{name}: {len(unexpected)} weights of the checkpoint are not in the model that config.json describes, such as {unexpected[0]}; "
            "they would be left out. Mend config.json (num_hidden_layers, biases), or remove them from the checkpoint."
        )
    if different := sorted(found["mismatched_keys"]):
        key, there, wanted = different[0]
        problems.append(
            f"{name}: {len(different)} weights have another shape than config.json says, such as {key}: {tuple(there)} in the checkpoint, "
            f"{tuple(wanted)} by config.json. Mend config.json (vocab_size, hidden_size, …)."
        )
    return problems


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bar and no report of transformers' own: what they would say is said here, or is of no model that is trained."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()

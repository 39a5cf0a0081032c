"""Load the pretrained model: what is checked before, how ranks share the reading, what is fixed after."""

import copy
import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from sft.flags import ModelArguments, TrainingArguments
from sft.job import UserError, all_ranks_or_none, rank, say, world_size
from sft.model.find import not_found
from sft.model.safe_loads import safe_loads


def model_problems(flags) -> list[str]:
    """Check --model_name_or_path, the class to wrap and the layers to add to, with the config alone."""
    name = flags.model_name_or_path
    if not name:
        return []
    folder = Path(name)
    if folder.exists():
        if not (folder / "config.json").is_file():
            return [f"{name}: no config.json there. --model_name_or_path takes a model's folder or a hub repository."]
        if not any(folder.glob("*.safetensors")) and not any(folder.glob("pytorch_model*.bin")):
            return [f"{name}: a config.json but no weights (model.safetensors). Download the model completely."]
    if problems := config_problems(flags):
        return problems
    config = load_config(flags)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), trust_remote_code=flags.trust_remote_code)
    present = {type(module).__name__ for module in model.modules()}
    layers = ", ".join(sorted(name for name in present if "Layer" in name))
    linear = [f".{name}" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    candidates = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linear}))
    targets = flags.lora_target_modules or []
    return [
        f"{name} has no layer of class {wrap_class}, which FSDP should wrap. Its decoder layer: {layers}."
        for wrap_class in (flags.fsdp_config or {}).get("transformer_layer_cls_to_wrap", [])
        if wrap_class not in present
    ] + [  # peft ignores a wrong one among several
        f"--lora_target_modules {target}: no linear layer of this model has that name. It has {candidates}."
        for target in (targets if targets != ["all-linear"] else [])
        if not any(linear_name.endswith(f".{target}") for linear_name in linear)
    ]


def config_problems(flags) -> list[str]:
    """Why the model's config cannot be loaded."""
    name = flags.model_name_or_path
    if missing := not_found(name, flags.cache_dir):
        return [missing]
    try:
        load_config(flags)
        return []
    except (OSError, ValueError) as error:
        return [f"{name}: its config cannot be loaded: {str(error).strip().splitlines()[0]}"]


def load_config(model_args: ModelArguments) -> PreTrainedConfig:
    """Read the model's config, once in a process. Every caller gets the same object: copy it before changing it."""
    return _read_config(model_args.model_name_or_path, model_args.cache_dir, model_args.trust_remote_code)


@functools.cache
def _read_config(name: str, cache_dir: str | None, trust_remote_code: bool) -> PreTrainedConfig:
    return AutoConfig.from_pretrained(name, cache_dir=cache_dir, trust_remote_code=trust_remote_code)


@contextmanager
def whole_models(training_args: TrainingArguments) -> Iterator[None]:
    """Models made inside are whole on each rank.

    TrainingArguments announces ZeRO-3 to `from_config` and `from_pretrained` as soon as it exists (transformers 5.23):
    outside they split a model among the ranks.
    """
    if training_args.deepspeed:
        unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if training_args.deepspeed:
            set_hf_deepspeed_config(training_args.hf_deepspeed_config)


def start_deepspeed(training_args: TrainingArguments) -> None:
    """Tell DeepSpeed about the ranks before the model loads: ZeRO-3 splits the weights while they are read.

    Accelerate does this on a GPU. On the CPU it starts torch.distributed alone (1.15, state.py), and DeepSpeed would
    assume world size 1.
    """
    if training_args.deepspeed:
        # deepspeed 0.19.8 on torch 2.13: hundreds of lines about the new names of two collectives
        warnings.filterwarnings("ignore", message=".*torch.distributed.* is deprecated", category=FutureWarning)
        if training_args.device.type == "cpu":
            import deepspeed

            deepspeed.init_distributed(dist_backend="gloo")


def rank_0_reads(model_args: ModelArguments, training_args: TrainingArguments) -> bool:
    """Whether Accelerate will give each rank its shards from the weights of rank 0 (1.15, fsdp_utils.py: not 4-bit ones)."""
    plugin = training_args.fsdp_plugin_args or {}
    from_rank_0 = plugin.get("fsdp_version") == 2 and plugin["cpu_ram_efficient_loading"]
    return bool(from_rank_0 and world_size() > 1 and not model_args.load_in_4bit)


def load_weights(
    model_args: ModelArguments, args: TrainingArguments, config: PreTrainedConfig, **options: Any
) -> PreTrainedModel:
    """Load the weights with `from_pretrained` and its options; under FSDP rank 0 alone reads them.

    The other ranks would all read the whole checkpoint (transformers 5.23, whatever `cpu_ram_efficient_loading` says), and
    drop it when Accelerate hands out the shards. They get the same model with one zero in the place of each weight. The
    zeros are not on the meta device because Accelerate recognises the optimizer's parameters by their addresses, which
    are all 0 there (1.15, accelerator.py, _prepare_fsdp2).
    """
    start_deepspeed(args)
    name, handed_on = model_args.model_name_or_path, rank_0_reads(model_args, args)
    given = {"config": config, "cache_dir": model_args.cache_dir, "trust_remote_code": model_args.trust_remote_code}
    model = None
    with all_ranks_or_none() if handed_on else nullcontext(), safe_loads(name, deepspeed=False):
        if rank() == 0 or not handed_on:
            model, found = AutoModelForCausalLM.from_pretrained(name, **given, **options, output_loading_info=True)
            refuse_new_weights(name, found)
    if not handed_on:
        return model
    weights = model.parameters() if model else ()
    zeros = {id(w): torch.nn.Parameter(w.new_zeros(()).expand(w.shape), w.requires_grad) for w in weights}
    handed = [model and copy.deepcopy(model, zeros)]  # config, ties and buffers are those of rank 0
    torch.distributed.broadcast_object_list(handed)
    return model or handed[0]


def refuse_new_weights(name: str, found: dict[str, Any]) -> None:
    """Raise a UserError when the checkpoint lacks weights of the model: transformers fills them in at random, with a warning."""
    missing, unexpected = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    if not missing:
        return
    others = f" It has {len(unexpected)} that the model does not know, such as {unexpected[0]}." if unexpected else ""
    if any(key.startswith("_orig_mod.") for key in unexpected):  # the name that torch.compile gives
        others += " torch.compile put _orig_mod. before their names: save the model without it, or remove that from the names."
    raise UserError(
        f"{name}: {len(missing)} of the model's weights are not in the checkpoint, such as {missing[0]}; they would be trained from "
        f"random numbers.{others} Download the model again, or take a checkpoint that is complete."
    )


def numel(parameter: torch.Tensor) -> int:
    """Elements of a whole weight: ZeRO-3 leaves an empty tensor on each rank, and 4-bit weights are packed."""
    state = getattr(parameter, "quant_state", None)
    return state.shape.numel() if state is not None else getattr(parameter, "ds_numel", parameter.numel())


def make_generation_config_valid(model: PreTrainedModel) -> None:
    """Mend a generation config that save_pretrained would refuse after training: sampling settings without sampling."""
    try:
        model.generation_config.validate(strict=True)
    except ValueError as error:
        model.generation_config.do_sample = True
        model.generation_config.validate(strict=True)
        say(f"generation_config: do_sample set to True, else it could not be saved ({str(error).splitlines()[0]})")

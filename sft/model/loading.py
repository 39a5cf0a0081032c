"""Load the pretrained model: what is checked before, how ranks share the reading, what is fixed after."""

import copy
import functools
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from sft.flags import ModelArguments, TrainingArguments
from sft.job import UserError, all_ranks_or_none, rank, say, world_size
from sft.model import headers
from sft.model.find import not_found
from sft.model.safe_loads import safe_loads
from sft.outside import reading


def model_problems(flags) -> list[str]:
    """Check --model_name_or_path, the class to wrap and the layers to add to, with the config alone."""
    name = flags.model_name_or_path
    if not name:
        return []
    folder = Path(name)
    if problems := headers.pointer_problems(folder):
        return problems
    if folder.exists() and not (folder / "config.json").is_file():
        return [f"{name}: no config.json there. --model_name_or_path takes a model's folder or a hub repository."]
    try:
        config = load_config(flags)
        model = skeleton(flags, config)
    except UserError as error:
        return error.problems
    if problems := headers.header_problems(flags, config, model):
        return problems
    present = {type(module).__name__ for module in model.modules()}
    layers = ", ".join(sorted(name for name in present if "Layer" in name))
    linear = [f".{name}" for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    candidates = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linear}))
    targets = flags.lora_target_modules or []
    tied = getattr(config, "tie_word_embeddings", False)
    head = [target for target in targets if tied and target.endswith("lm_head")]
    if head and flags.merge_lora:
        return [
            f"--lora_target_modules {head[0]} with --merge_lora True: this model's head is its embedding too, and an addition to the "
            "head alone cannot be merged into it. Leave the head out, or remove --merge_lora."
        ]
    return [
        f"{name} has no layer of class {wrap_class}, which FSDP should wrap. Its decoder layer: {layers}."
        for wrap_class in (flags.fsdp_config or {}).get("transformer_layer_cls_to_wrap", [])
        if wrap_class not in present
    ] + [  # peft ignores a wrong one among several
        f"--lora_target_modules {target}: no linear layer of this model has that name. It has {candidates}."
        for target in (targets if targets != ["all-linear"] else [])
        if not any(linear_name.endswith(f".{target}") for linear_name in linear)
    ]


def liger_problems(flags) -> list[str]:
    """Refuse --use_liger_kernel for a model that Liger has no kernels for: it would be left as it is, without a word (0.8)."""
    if not flags.use_liger_kernel or flags.use_cpu or not find_spec("liger_kernel") or not flags.model_name_or_path:
        return []
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    try:
        kind = load_config(flags).model_type
    except UserError:
        return []  # `model_problems` says why
    refused = f"--use_liger_kernel: Liger has no kernels for {kind} models. Remove the flag."
    return [refused] * (kind not in MODEL_TYPE_TO_APPLY_LIGER_FN)


def load_config(model_args: ModelArguments) -> PreTrainedConfig:
    """Read the model's config, once in a process. Every caller gets the same object: copy it before changing it.

    Raises:
        UserError: it is not there, or transformers refuses it.
    """
    return _read_config(model_args.model_name_or_path, model_args.cache_dir, model_args.trust_remote_code)


@functools.cache
def _read_config(name: str, cache_dir: str | None, trust_remote_code: bool) -> PreTrainedConfig:
    if missing := not_found(name, cache_dir):
        raise UserError(missing)
    try:
        return AutoConfig.from_pretrained(name, cache_dir=cache_dir, trust_remote_code=trust_remote_code)
    except Exception as error:  # of any check that a config's class makes of its values
        raise UserError(f"{name}: its config cannot be loaded: {_in_a_line(error)}") from error


def skeleton(model_args: ModelArguments, config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a config on the meta device. Raises a UserError when these scripts cannot train it, or nobody can build it."""
    name = model_args.model_name_or_path
    quantized, vocabulary = getattr(config, "quantization_config", None), getattr(config, "vocab_size", None)
    pad, rope = config.pad_token_id, getattr(config, "rope_parameters", None) or {}
    ropes = [rope, *(part for part in rope.values() if isinstance(part, dict))]  # or one for each type of layer
    unknown = [
        part["rope_type"] for part in ropes if part.get("rope_type", "default") not in ("default", *ROPE_INIT_FUNCTIONS)
    ]
    if config.is_encoder_decoder:
        raise UserError(
            f"{name}: {config.model_type} is an encoder-decoder, and these scripts train causal language models."
        )
    if quantized is not None:
        method = quantized.get("quant_method", "?") if isinstance(quantized, dict) else quantized.quant_method
        raise UserError(
            f"{name}: its weights are quantized ({getattr(method, 'value', method)}), and what is rounded so cannot be trained. Take the model that "
            "it was made from; to hold that in 4 bits, add --use_lora True --load_in_4bit True."
        )
    if pad is not None and vocabulary is not None and pad >= vocabulary:
        raise UserError(
            f"{name}: config.json says pad_token_id {pad}, outside of the embedding's {vocabulary} rows (vocab_size). Mend pad_token_id."
        )
    if unknown:
        raise UserError(
            f"{name}: config.json has the rope type {unknown[0]!r}, which transformers {transformers.__version__} does not know. It knows "
            f"default, {', '.join(ROPE_INIT_FUNCTIONS)}."
        )
    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(
                copy.deepcopy(config), trust_remote_code=model_args.trust_remote_code
            )
    except Exception as error:  # of a class that these values do not fit, or a type that has no causal model
        raise UserError(
            f"{name}: transformers makes no causal language model of its config.json: {_in_a_line(error)}"
        ) from error


def _in_a_line(error: Exception) -> str:
    """An error's class and first lines, without the lists that follow."""
    text = " ".join(str(error).strip().splitlines()[:2])
    return f"{type(error).__name__}: {text}"[:300]


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
    whole = all_ranks_or_none() if handed_on else nullcontext()
    with whole, reading(f"{name}: the model's files"), safe_loads(name, deepspeed=False):
        if rank() == 0 or not handed_on:
            # a checkpoint whose headers were not there to be read before (a download) is judged now
            read = {"output_loading_info": True, "ignore_mismatched_sizes": True}
            model, found = AutoModelForCausalLM.from_pretrained(name, **given, **options, **read)
            if problems := headers.differences(name, found, model_args.allow_new_weights):
                raise UserError(problems)
    if not handed_on:
        return model
    weights = model.parameters() if model else ()
    zeros = {id(w): torch.nn.Parameter(w.new_zeros(()).expand(w.shape), w.requires_grad) for w in weights}
    handed = [model and copy.deepcopy(model, zeros)]  # config, ties and buffers are those of rank 0
    torch.distributed.broadcast_object_list(handed)
    return model or handed[0]


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

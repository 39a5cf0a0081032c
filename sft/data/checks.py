"""Find what is wrong with the data and the tokenizer before anything slow: template, files, columns, vocabulary."""

import copy
import json
from typing import TYPE_CHECKING

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from sft.data.files import DataFile, header_problems
from sft.data.segments import columns_of
from sft.data.template import load_template
from sft.data.tokenizer_files import added_around
from sft.job import UserError
from sft.outside import counted

if TYPE_CHECKING:  # the commands read tokenizers without the Trainer's arguments, which import peft and bitsandbytes
    from sft.flags import DataArguments


def data_problems(data_args: "DataArguments") -> list[str]:
    """Problems that are known before a row is tokenized: template, files, columns."""
    problems = []
    template = None
    try:
        template = load_template(data_args.prompt_template, conversations=bool(data_args.messages))
    except UserError as error:
        problems += error.problems
    if data_args.eval_data_path and data_args.eval_split:
        problems.append("--eval_data_path and --eval_split both name the evaluation data. Give one of them.")
    if not 0 <= data_args.eval_split < 1:
        problems.append(f"--eval_split {data_args.eval_split:g}: give a share from 0 up to 1, such as 0.02.")
    if data_args.train_on not in ("all", "last"):
        problems.append(f"--train_on {data_args.train_on}: choose all (every answer) or last.")
    if data_args.source == data_args.target and not data_args.messages:
        problems.append(f"--source and --target are both {data_args.source!r}. Name two columns.")
    for file in map(DataFile.of, [*(data_args.data_path or []), *(data_args.eval_data_path or [])]):
        columns = columns_of(data_args, template or load_template("none"))
        problems += file.problems() + header_problems(
            file.path, columns, not data_args.messages, data_args.allow_numbers
        )
    return problems


def too_many_positions(model_config, lengths: np.ndarray) -> tuple[str, bool]:
    """What to say of examples that are longer than the model's positions, "" if none is, and whether they cannot be computed."""
    limit = getattr(model_config, "max_position_embeddings", None)
    rope = getattr(model_config, "rope_parameters", None) or {}
    beyond = np.count_nonzero(lengths > limit) if limit and rope.get("rope_type") != "dynamic" else 0
    if not beyond:
        return "", False
    text = (
        f"{beyond:,} of {len(lengths):,} examples are longer than the model's {limit:,} positions (the longest has {lengths.max():,} tokens): "
        f"--model_max_length {limit} cuts them"
    )
    if _has_table_of(limit, model_config):
        return f"{text}; the model has a table of positions that ends there", True
    return f"{text}, a rope scaling in config.json (rope_parameters) stretches the positions", False


def _has_table_of(positions: int, model_config) -> bool:
    """Whether the model looks positions up in a table of so many rows (GPT-2; OPT has two more) instead of computing them."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(model_config))
    words = model.get_input_embeddings()
    tables = [
        module.weight for module in model.modules() if isinstance(module, torch.nn.Embedding) and module is not words
    ]
    tables += list(model.buffers())
    return any(table.dim() == 2 and positions <= len(table) <= positions + 2 for table in tables)


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model_config) -> list[str]:
    """Problems between a tokenizer and the model it is to feed, known before weights load."""
    problems = []
    declared, rows = model_config.eos_token_id, model_config.vocab_size
    if declared is not None and tokenizer.eos_token_id not in (declared if isinstance(declared, list) else [declared]):
        problems.append(
            f"tokenizer: EOS {tokenizer.eos_token!r} is id {tokenizer.eos_token_id}, but the model's config.json says eos_token_id {declared}. "
            "A model trained so never stops. Fix eos_token_id in config.json, or eos_token in tokenizer_config.json."
        )
    before, bos = added_around(tokenizer)[0], model_config.bos_token_id
    if before and bos is not None and bos not in before:
        put, of_the_model = tokenizer.convert_ids_to_tokens([before[0], bos])
        problems.append(
            f"tokenizer: it puts {put!r} ({before[0]}) before each prompt, but the model's config.json says bos_token_id {bos} ({of_the_model!r}). If the "
            f'model was pre-trained with the first, write "bos_token_id": {before[0]} into config.json; if with the second, name {of_the_model!r} in the '
            f'post_processor of tokenizer.json, or, where there is none, write "bos_token": {json.dumps(of_the_model)} into tokenizer_config.json.'
        )
    outside = sorted((i, token) for token, i in tokenizer.get_vocab().items() if i >= rows)
    if outside:
        named = ", ".join(f"{token!r} = {i}" for i, token in outside[:5]) + (", …" if len(outside) > 5 else "")
        problems.append(
            f"tokenizer: {counted(len(outside), 'token')} outside the model's embedding of {rows} rows ({named}). "
            "Use the tokenizer of this model, or take these tokens out of added_tokens.json and tokenizer.json."
        )
    return problems

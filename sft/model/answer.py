"""Generate greedy answers to prompts of token ids: for evaluations and for `python -m sft.generate`."""

from typing import Any

import torch
from transformers import GenerationConfig

from sft.job import world_size


def greedy_answers(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    device: torch.device,
    max_new_tokens: int,
    streamer: Any = None,
) -> list[tuple[list[int], bool]]:
    """Answer all prompts in one batch, padded on the left, so that every answer starts in the same column.

    A collective: every rank of a job calls it. The model (whole or sharded, or peft's wrapper) stays in training mode if
    it was; a streamer gets the tokens of a single prompt's answer while they are made.

    Returns: for each prompt the ids of its answer without EOS, and whether it was cut: it had not ended in time.
    """
    width, pad, eos = max(map(len, prompts)), tokenizer.pad_token_id, tokenizer.eos_token_id
    ends = {"max_new_tokens": max_new_tokens, "eos_token_id": eos, "pad_token_id": pad}
    was_training = model.training
    model.eval()

    def moved(_: Any, args: tuple, inputs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        return args, {name: value.to(device) if torch.is_tensor(value) else value for name, value in inputs.items()}

    # transformers (5.23) moves the inputs to where the weights lie, which is the host when FSDP or ZeRO-3 offloads them
    generating = getattr(model, "get_base_model", lambda: model)()
    with torch.no_grad(), generating.register_forward_pre_hook(moved, with_kwargs=True):
        output = model.generate(
            input_ids=torch.tensor([[pad] * (width - len(ids)) + ids for ids in prompts], device=device),
            attention_mask=torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], device=device),
            generation_config=GenerationConfig(do_sample=False, use_cache=True, **ends),
            streamer=streamer,
            synced_gpus=world_size() > 1,  # no rank stops while another one still needs its shards
        )
    model.train(was_training)
    answers = output[:, width:].tolist()
    return [(ids[: ids.index(eos)] if eos in ids else ids, eos not in ids) for ids in answers]

"""Small models, random examples, and a step on them as the stock Trainer computes it."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sft import IGNORE_INDEX


def small_llama(**config) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "vocab_size": 211, "max_position_embeddings": 256}
    model = LlamaForCausalLM(LlamaConfig(**(shape | config)))
    for weight in model.parameters():  # at the usual scale all losses are log(vocabulary) and nothing would show
        weight.data *= 4 if weight.dim() > 1 else 1
    model.config.use_cache = False
    return model


def rows(count: int, seed: int = 0) -> list[dict]:
    """Examples of 3 to 60 tokens whose prompt, the first third or so, is masked."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for length in torch.randint(3, 61, (count,), generator=generator).tolist():
        ids = torch.randint(0, 211, (length,), generator=generator)
        labels = ids.clone()
        labels[: max(1, length // 3)] = IGNORE_INDEX
        made.append({"input_ids": ids, "labels": labels})
    return made


def padded_batch(examples: list[dict]) -> dict:
    pad = torch.nn.utils.rnn.pad_sequence
    lengths = torch.tensor([len(example["input_ids"]) for example in examples])
    return {
        "input_ids": pad([example["input_ids"] for example in examples], batch_first=True),
        "labels": pad([example["labels"] for example in examples], batch_first=True, padding_value=IGNORE_INDEX),
        "attention_mask": (torch.arange(lengths.max()) < lengths[:, None]).long(),
    }


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def padded_step(model, micro_batches: list[list[dict]]):
    """One optimizer step's loss and gradients as the stock Trainer computes them."""
    model.zero_grad()
    batches = [padded_batch(examples) for examples in micro_batches]
    tokens = sum((batch["labels"][:, 1:] != IGNORE_INDEX).sum() for batch in batches)
    loss = torch.zeros(())
    for batch in batches:
        part = model(**batch, num_items_in_batch=tokens).loss
        part.backward()
        loss += part.detach()
    return loss, gradients(model)


def largest_error(found: dict, expected: dict) -> float:
    """Over all parameters, ||a - b|| / ||b||; NaN never passes a comparison with it."""
    assert found.keys() == expected.keys()
    return max(float((found[name] - expected[name]).norm() / expected[name].norm()) for name in expected)

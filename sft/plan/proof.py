"""Prove by behaviour that a model computes a packed row as it computes each example alone, and that no token sees a later one.

What is claimed of packing is claimed of the model at hand, so it is tried on it, on rows of the data: no list of architectures decides.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, PreTrainedConfig

from sft import IGNORE_INDEX
from sft.arithmetic import compute_dtype
from sft.flags import ModelArguments, TrainingArguments
from sft.model import loading
from sft.plan.model_sizes import with_layers
from sft.step import attention
from sft.step.loss import summed_loss
from sft.step.modules import exchange
from sft.step.packed_rows import PackedCollator

Example = dict[str, torch.Tensor]  # input_ids, labels: (tokens,)
# (examples, which) -> the summed loss of one, computed together with the others
Way = Callable[[list[Example], int], torch.Tensor]
# enough for a border on each side of an example; a few hundred tokens take a fraction of a second
EXAMPLES, TOKENS = 3, 64


class Proof(NamedTuple):
    """Largest relative differences found, and what they may be in the compute type."""

    loss: float  # of an example's loss, against the example alone
    gradient: float  # of its gradient's norm
    isolation: float  # of its loss, when another example's tokens change
    causality: float  # of the loss of its first tokens, when its later ones change
    rounding: float

    @property
    def fault(self) -> str | None:
        """What is wrong, in words; None when nothing is. NaN is wrong."""
        sees = 1e-5  # the same sums of the same numbers: nothing is rounded otherwise
        if not self.causality <= sees:
            return f"a token sees later ones (the loss of an example's first tokens moves by {100 * self.causality:.2g} % with the last ones)"
        if not self.isolation <= sees:
            return (
                f"examples see each other (a loss moves by {100 * self.isolation:.2g} % with another example's tokens)"
            )
        if not self.loss <= self.rounding:
            return f"an example's loss is off by {100 * self.loss:.2g} %: this model does more to its logits or its loss than is computed here"
        if not self.gradient <= self.rounding * (2 if self.rounding > 1e-3 else 20):
            return f"an example's gradient is off by {100 * self.gradient:.2g} % of its norm"
        return None

    def __str__(self) -> str:
        return (
            f"losses within {self.loss:.0e} and gradients within {self.gradient:.0e} of each example alone; other examples move a loss by "
            f"{self.isolation:.0e}, later tokens by {self.causality:.0e}"
        )


def prove(
    model_args: ModelArguments, args: TrainingArguments, config: PreTrainedConfig, dataset: Any, kernel: str | None
) -> Proof:
    """Try packing with this attention kernel, or padding (None), on a small model of the run's architecture with random weights.

    The model has as many layers as it takes to have each kind of them, and weights large enough that a fault shows. It computes
    in float32 where the kernel can, because rounding hides what a few tokens do.
    """
    kinds = getattr(config, "layer_types", None) or []
    layers = max([2, *(kinds.index(kind) + 1 for kind in set(kinds))])
    small = with_layers(config, min(layers, config.num_hidden_layers))
    if getattr(small, "output_router_logits", False):
        # its loss is a mean over all tokens of a batch: each way has its own
        small.output_router_logits = False
    half = compute_dtype(args) if kernel in (attention.TRITON, attention.VARLEN) else torch.float32
    if half != torch.float32:
        # these kernels take no float32: what packing does to the model itself is seen without them
        structure = prove(model_args, args, config, dataset, attention.PER_EXAMPLE)
        if structure.fault:
            return structure
    with torch.random.fork_rng([args.device] if args.device.type == "cuda" else []), loading.whole_models(args):
        torch.manual_seed(0)
        with torch.device(args.device):
            model = AutoModelForCausalLM.from_config(
                small, dtype=torch.float32, trust_remote_code=model_args.trust_remote_code
            ).eval()
        for weight in model.parameters():  # scores of attention with a spread of about 4, as in trained models
            if weight.dim() == 2:
                weight.data *= 2 / (weight.data.std() * weight.shape[1] ** 0.5)
        examples = short_examples(dataset)
        with torch.autocast(args.device.type, half, enabled=half != torch.float32):
            alone = losses_alone(model, examples)
            if kernel is None:
                return try_out(model, partial(stock, model), examples, alone)
            model.set_attn_implementation(kernel)
            return try_out(model, packed(model, exchange(model), PackedCollator()), examples, alone)


def try_out(model: torch.nn.Module, way: Way, examples: list[Example], alone: list[tuple[float, float]]) -> Proof:
    """Compare a way of computing with `alone` (`losses_alone`).

    Args:
        model: in evaluation mode.
        examples: of `short_examples`.
    """
    dtype = torch.get_autocast_dtype(_device(model).type) if torch.is_autocast_enabled(_device(model).type) else None
    rounding = 2e-2 if dtype in (torch.bfloat16, torch.float16) else 1e-5
    losses, gradients, isolation, causality = [], [], [], []
    for which, (loss_alone, norm_alone) in enumerate(alone):
        together = way(examples, which)
        losses.append(_off(together.item(), loss_alone))
        gradients.append(_off(_gradient_norm(model, together), norm_alone))
        with torch.no_grad():
            others = [one if number == which else _changed(one, half=False) for number, one in enumerate(examples)]
            isolation.append(_off(way(others, which).item(), together.item()))
            early, changed = (list(examples) for _ in range(2))
            early[which], changed[which] = _early(examples[which]), _changed(_early(examples[which]), half=True)
            causality.append(_off(way(changed, which).item(), way(early, which).item()))
    # max() would lose a NaN that is not the first
    found = (losses, gradients, isolation, causality)
    loss, gradient, seen, later = (math.nan if any(map(math.isnan, each)) else max(each) for each in found)
    return Proof(loss, gradient, seen, later, rounding)


def losses_alone(model: Any, examples: list[Example]) -> list[tuple[float, float]]:
    """(loss summed over trained tokens, norm of its gradient) of each example by the model's stock forward and its own loss."""
    found = []
    for example in examples:
        loss = stock(model, [example], 0)
        found.append((loss.item(), _gradient_norm(model, loss)))
    return found


def stock(model: Any, examples: list[Example], which: int) -> torch.Tensor:
    """One example's loss in a padded batch, as the stock Trainer has it computed."""
    labels = [
        one["labels"] if number == which else one["labels"] * 0 + IGNORE_INDEX for number, one in enumerate(examples)
    ]
    lengths = torch.tensor([len(one["input_ids"]) for one in examples])
    batch = {
        "input_ids": pad_sequence([one["input_ids"] for one in examples], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
        "attention_mask": (torch.arange(lengths.max()) < lengths[:, None]).long(),
    }
    trained = int((labels[which][1:] != IGNORE_INDEX).sum())
    return model(**_to(batch, _device(model)), use_cache=False).loss * trained


def packed(model: Any, head: torch.nn.Module, collator: PackedCollator) -> Way:
    """The run's own way: examples in one row, its kernel, its loss."""

    def way(examples: list[Example], which: int) -> torch.Tensor:
        only = [
            one if number == which else one | {"labels": one["labels"] * 0 + IGNORE_INDEX}
            for number, one in enumerate(examples)
        ]
        return summed_loss(model, head, _to(collator(only), _device(model)))

    return way


def short_examples(dataset: Any) -> list[Example]:
    """The beginnings of the first rows, each with tokens that are trained: all of the last half where a prompt fills the beginning."""
    examples = []
    for index in range(min(EXAMPLES, len(dataset))):
        ids = dataset[index]["input_ids"][:TOKENS].clone()
        labels = dataset[index]["labels"][:TOKENS].clone()
        if (labels[1:] != IGNORE_INDEX).sum() < 4:
            labels[len(ids) // 2 :] = ids[len(ids) // 2 :]
        if len(ids) <= 4:  # too short to change a part of it
            ids, labels = ids.repeat(4), labels.repeat(4)
        examples.append({"input_ids": ids, "labels": labels})
    return examples * EXAMPLES if len(examples) == 1 else examples


def _early(example: Example) -> Example:
    """The example with labels in the first half of its trained part only."""
    trained = (example["labels"] != IGNORE_INDEX).nonzero().flatten()
    labels = example["labels"].clone()
    labels[trained[(len(trained) + 1) // 2] if len(trained) > 1 else len(labels) :] = IGNORE_INDEX
    return example | {"labels": labels}


def _changed(example: Example, half: bool) -> Example:
    """The example with other tokens in its trained part, or after its last label. The prompt stays: it may be shared."""
    trained = (example["labels"] != IGNORE_INDEX).nonzero().flatten()
    start = int(trained[-1]) + 1 if half else int(trained[0])
    ids = example["input_ids"].clone()
    ids[start:] = ids[start:].flip(0).roll(1) if len(set(ids[start:].tolist())) > 1 else ids[0]
    return example | {"input_ids": ids}


def _gradient_norm(model: torch.nn.Module, loss: torch.Tensor) -> float:
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    gradients = torch.autograd.grad(loss, weights, allow_unused=True)
    return float(torch.stack([part.float().norm() for part in gradients if part is not None]).norm())


def _off(found: float, expected: float) -> float:
    return abs(found - expected) / max(abs(expected), 1e-9)


def _device(model: torch.nn.Module) -> torch.device:
    return next(model.parameters()).device


def _to(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}

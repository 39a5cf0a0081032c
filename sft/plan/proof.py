"""Prove by behaviour that a model computes a packed row as it computes each example alone, and that no token sees a later one.

What is claimed of packing is claimed of the model at hand, so it is tried on it, on rows of the data: no list of architectures decides.
"""

import math
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, PreTrainedConfig

from sft import IGNORE_INDEX
from sft.arithmetic import compute_dtype
from sft.flags import ModelArguments, TrainingArguments
from sft.job import UserError, swapped
from sft.model import headers, loading
from sft.model.safe_loads import safe_loads
from sft.plan.model_sizes import with_layers
from sft.step import attention
from sft.step.loss import summed_loss
from sft.step.modules import exchange
from sft.step.packed_rows import PackedCollator

Example = dict[str, torch.Tensor]  # input_ids, labels: (tokens,)
# (examples, which) -> the summed loss of one, computed together with the others, or of all (None)
Way = Callable[[list[Example], int | None], torch.Tensor]
# enough for a border on each side of an example; a few hundred tokens take a fraction of a second
EXAMPLES, TOKENS = 3, 64
# Whole rows cost more: at most 1 % of a run's. Each example is passed 7 times through the model in a row of all (forward and backward, and
# three times forward), and once alone; 22 forward passes of all, where the run makes 3 of each of its tokens.
LONGEST, PASSES = 1024, 22
# The whole model is tried on two beginnings: 16 forward passes of both.
WHOLE_EXAMPLES, WHOLE_PASSES = 2, 16
FREE_FLOPS = 1e11  # a second or two of a CPU
# cuDNN's takes two seconds to plan a first pass, which no packed run needs
STOCK_KERNELS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


class NotFinite(UserError):
    """Weights hold NaN or infinity, so that nothing can be proved."""


class Proof(NamedTuple):
    """Largest relative differences found, and what they may be in the compute type.

    An example's differences count by its mean loss where that is below 1: of a text that is known by heart nothing but rounding is left.
    """

    loss: float  # of an example's loss, against the example alone
    gradient: float  # of its gradient's norm
    isolation: float  # of its loss, when another example's tokens change
    causality: float  # of the loss of its first tokens, when its later ones change
    rounding: float
    weights: str = ""  # which, in words
    tokens: tuple[int, ...] = ()  # of each example
    mixture: bool = False  # whose experts may be others after rounding, here and there

    @property
    def fault(self) -> str | None:
        """What is wrong, in words; None when nothing is. NaN is wrong."""
        if math.isnan(self.loss):
            return "an example's loss is not a number"
        # the same sums of the same numbers: nothing is rounded otherwise but in a mixture's experts, which others' tokens share
        sees = max(1e-5, self.rounding / (1 if self.mixture else 20))
        if not self.causality <= sees:
            return f"a token sees later ones (the loss of an example's first tokens moves by {100 * self.causality:.2g} % with the last ones)"
        if not self.isolation <= sees:
            return (
                f"examples see each other (a loss moves by {100 * self.isolation:.2g} % with another example's tokens)"
            )
        if not self.loss <= self.rounding:
            return f"an example's loss is off by {100 * self.loss:.2g} %: this model does to its logits, its attention or its positions what is not done here"
        if not self.gradient <= self.rounding * (2 if self.rounding > 1e-3 else 20):
            return f"an example's gradient is off by {100 * self.gradient:.2g} % of its norm"
        return None


def in_a_line(proofs: list[Proof]) -> str:
    """The largest differences of all proofs, and what they were tried on."""
    loss, gradient, isolation, causality = (max(values) for values in list(zip(*proofs))[:4])
    lengths = [tokens for proof in proofs for tokens in proof.tokens]
    *most, last = dict.fromkeys(proof.weights for proof in proofs)
    return (
        f"proof: losses within {loss:.0e} and gradients within {gradient:.0e} of each example alone; other examples move a loss by {isolation:.0e}, "
        f"later tokens by {causality:.0e} (with {' and '.join([*filter(None, [', '.join(most)]), last])}, on rows of "
        f"{min(lengths)} to {max(lengths):,} tokens; rounding may be {proofs[-1].rounding:.0e})"
    )


def prove(
    model_args: ModelArguments,
    args: TrainingArguments,
    config: PreTrainedConfig,
    examples: list[Example],
    kernel: str | None,
) -> list[Proof]:
    """Try packing with this attention kernel, or padding (None), on the first layers of the run's model, as many as it takes to have each kind.

    First on the beginnings of rows with random weights, large enough that a fault shows, and in float32 where the kernel can,
    because rounding hides what a few tokens do. Then on the rows with the checkpoint's weights, their scales and buffers, in the
    run's compute type; without a checkpoint there is nothing to load.

    Args:
        examples: of `first_rows`.

    Returns: proofs up to the first that has a fault.
    """
    with loading.whole_models(args):
        kinds = kinds_of_layers(loading.skeleton(model_args, config), config)
    layers = min(max([2, *(kinds.index(kind) + 1 for kind in kinds)]), config.num_hidden_layers)
    half = compute_dtype(args) if kernel in (attention.TRITON, attention.VARLEN) else torch.float32
    tries = [("random weights", kernel, half)]
    if half != torch.float32:
        # these kernels take no float32: what packing does to the model itself is seen without them
        tries.insert(0, ("random weights", attention.PER_EXAMPLE, torch.float32))
    if model_args.model_name_or_path:
        loaded = f"the checkpoint's first {layers} of {config.num_hidden_layers} layers"
        tries.append((loaded, kernel, half))
    found: list[Proof] = []
    for weights, tried, dtype in tries:
        random = weights == "random weights"
        rows = beginnings(examples, TOKENS if random else LONGEST)
        cuda = [args.device] if args.device.type == "cuda" else []
        with torch.random.fork_rng(cuda), loading.whole_models(args):
            torch.manual_seed(0)
            small = with_layers(config, layers)
            routed = {"output_router_logits": True} if getattr(small, "output_router_logits", False) else {}
            if routed:
                # its loss is a mean over all tokens of a batch: each way has its own, unless an example is alone
                small.output_router_logits = False
            model = (random_layers if random else loaded_layers)(model_args, args, small).eval()
            with torch.autocast(args.device.type, dtype, enabled=dtype != torch.float32):
                alone = losses_alone(model, rows)
                with swapped(model.config, **routed):
                    with_router = stock(model, rows[:1], 0).item() if routed else 0.0
                way = padded(model, args.per_device_train_batch_size > 1)
                if tried:
                    model.set_attn_implementation(tried)
                    way = packed(model, exchange(model), PackedCollator())
                proof = try_out(model, way, rows, alone)
                if routed and not proof.fault:
                    with swapped(model.config, **routed):
                        proof = proof._replace(loss=max(proof.loss, _off(way(rows[:1], 0).item(), with_router)))
        if not random:
            refuse_broken_weights(model_args.model_name_or_path, model, proof)
        found.append(proof._replace(weights=weights, tokens=tuple(len(row["input_ids"]) for row in rows)))
        if proof.fault:
            break
    return found


def kinds_of_layers(model: torch.nn.Module, config: PreTrainedConfig) -> list[tuple]:
    """What each decoder layer is, by its name in the config and by its modules and shapes: the first ones may have no experts."""
    count = config.num_hidden_layers
    lists = (module for module in model.modules() if isinstance(module, torch.nn.ModuleList) and len(module) == count)
    parts = [
        tuple((name, type(part)) for name, part in layer.named_modules())
        for layer in next(lists, [torch.nn.Module()] * count)
    ]
    return list(zip(getattr(config, "layer_types", None) or [None] * count, parts))


def prove_whole(
    model: Any,
    head: torch.nn.Module | None,
    collator: PackedCollator,
    examples: list[Example],
    half: bool,
    together: bool,
    loss_of: Callable | None = None,
) -> Proof:
    """Try the model that will be trained, as it is in memory: its layers, adapters, number types, kernels. It stays as it was.

    Args:
        model: whole on this rank, not wrapped.
        head: from `modules.exchange`; None in a padded run.
        collator: the run's, of packed rows.
        half: the run computes in 16 bits.
        together: a padded batch has several examples.
        loss_of: (outputs, labels) -> the mean loss, where it is not the model's own (label smoothing).
    """
    training = model.training
    with ExitStack() as stack:
        # compiled layers would be compiled for these rows too
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        if getattr(model.config, "output_router_logits", False):
            stack.enter_context(swapped(model.config, output_router_logits=False))
        model.eval()
        stack.callback(model.train, training)
        way = packed(model, head, collator) if head else padded(model, together, loss_of)
        with attention.stock_attention(model) if head else ExitStack():
            alone = losses_alone(model, examples, loss_of=loss_of)
        found = try_out(model, way, examples, alone)
    torch.cuda.empty_cache()
    refuse_broken_weights("the model in memory", model, found)
    # rounding of all layers adds up
    mixture = half and any(weight.dim() == 3 for weight in model.parameters())
    tokens = tuple(len(row["input_ids"]) for row in examples)
    return found._replace(rounding=5e-2 if half else 1e-4, weights="the whole model", tokens=tokens, mixture=mixture)


def refuse_broken_weights(where: str, model: torch.nn.Module, found: Proof) -> None:
    """Raise NotFinite where that is why a difference is no number."""
    broken = []
    if not all(map(math.isfinite, found[:4])):
        broken = [name for name, weight in model.named_parameters() if not weight.isfinite().all()]
    if broken:
        raise NotFinite(
            f"{where}: {len(broken)} of the weights hold NaN or infinity, such as {broken[0]}: nothing can be trained from them. Take a "
            "checkpoint from before that."
        )


def rows_for_the_whole(dataset: Any, parameters: int, run_tokens: float, device: str) -> list[Example]:
    """The rows that the whole model is tried on before the first step; none where that costs more than 1 % of a run on a CPU."""
    tokens = WHOLE_PASSES * WHOLE_EXAMPLES * TOKENS
    if device == "cpu" and 2 * parameters * tokens > FREE_FLOPS and tokens > 0.01 * 3 * run_tokens:
        return []
    return first_rows(dataset, run_tokens=0)[:WHOLE_EXAMPLES]


def random_layers(model_args: ModelArguments, args: TrainingArguments, small: PreTrainedConfig) -> Any:
    """A model whose attention is as sharp as trained ones': scores with a spread of about 4."""
    with torch.device(args.device):
        model = AutoModelForCausalLM.from_config(
            small, dtype=torch.float32, trust_remote_code=model_args.trust_remote_code
        )
    for weight in model.parameters():
        if weight.dim() == 2 and weight.any():  # biases of experts are zeros
            weight.data *= 2 / (weight.data.std() * weight.shape[1] ** 0.5)
    return model


def loaded_layers(model_args: ModelArguments, args: TrainingArguments, small: PreTrainedConfig) -> Any:
    """The checkpoint's embedding, first layers and head: of the files no more is read."""
    name, given = model_args.model_name_or_path, {"cache_dir": model_args.cache_dir, "dtype": torch.float32}
    with headers.quiet(), safe_loads(name, deepspeed=False):
        remote = model_args.trust_remote_code
        model = AutoModelForCausalLM.from_pretrained(name, config=small, trust_remote_code=remote, **given)
    return model.to(args.device)


def try_out(model: torch.nn.Module, way: Way, examples: list[Example], alone: list[tuple[float, float]]) -> Proof:
    """Compare a way of computing with `alone` (`losses_alone`).

    Args:
        model: in evaluation mode.
        examples: of `beginnings`.
    """
    dtype = torch.get_autocast_dtype(_device(model).type) if torch.is_autocast_enabled(_device(model).type) else None
    rounding = 2e-2 if dtype in (torch.bfloat16, torch.float16) else 1e-5
    losses, gradients, isolation, causality = [], [], [], []
    for which, (loss_alone, norm_alone) in enumerate(alone):
        together = way(examples, which)
        known = min(1.0, abs(loss_alone) / _trained([examples[which]]))
        losses.append(known * _off(together.item(), loss_alone))
        gradients.append(known * _off(_gradient_norm(model, together), norm_alone))
        with torch.no_grad():
            others = [one if number == which else _changed(one, half=False) for number, one in enumerate(examples)]
            isolation.append(known * _off(way(others, which).item(), together.item()))
            early, changed = (list(examples) for _ in range(2))
            early[which], changed[which] = _early(examples[which]), _changed(_early(examples[which]), half=True)
            causality.append(known * _off(way(changed, which).item(), way(early, which).item()))
    with torch.no_grad():  # where all of them have labels, as in a run
        summed = sum(loss for loss, _ in alone)
        losses.append(min(1.0, abs(summed) / _trained(examples)) * _off(way(examples, None).item(), summed))
    # max() would lose a NaN that is not the first
    found = (losses, gradients, isolation, causality)
    loss, gradient, seen, later = (math.nan if any(map(math.isnan, each)) else max(each) for each in found)
    return Proof(loss, gradient, seen, later, rounding)


def losses_alone(model: Any, examples: list[Example], loss_of: Callable | None = None) -> list[tuple[float, float]]:
    """(loss summed over trained tokens, norm of its gradient) of each example by the model's stock forward and its own loss."""
    found = []
    for example in examples:
        with sdpa_kernel(STOCK_KERNELS):
            loss = stock(model, [example], 0, loss_of)
        found.append((loss.item(), _gradient_norm(model, loss)))
    return found


def stock(model: Any, examples: list[Example], which: int | None, loss_of: Callable | None = None) -> torch.Tensor:
    """One example's loss in a padded batch, or all of theirs, as the stock Trainer has it computed."""
    examples = _labelled(examples, which)
    labels = [one["labels"] for one in examples]
    lengths = torch.tensor([len(one["input_ids"]) for one in examples])
    batch = {
        "input_ids": pad_sequence([one["input_ids"] for one in examples], batch_first=True),
        "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
        "attention_mask": (torch.arange(lengths.max()) < lengths[:, None]).long(),
    }
    batch = _to(batch, _device(model))
    outputs = model(**batch, use_cache=False)
    return (loss_of(outputs, batch["labels"]) if loss_of else outputs.loss) * _trained(examples)


def padded(model: Any, together: bool, loss_of: Callable | None = None) -> Way:
    """The way of a padded run: examples in one batch, or each in its own. A batch's longest row may decide a rope's frequencies."""

    def way(examples: list[Example], which: int | None) -> torch.Tensor:
        if together:
            return stock(model, examples, which, loss_of)
        numbers = range(len(examples)) if which is None else [which]
        return torch.stack([stock(model, [examples[number]], 0, loss_of) for number in numbers]).sum()

    return way


def packed(model: Any, head: torch.nn.Module, collator: PackedCollator) -> Way:
    """The run's own way: examples in one row, its kernel, its loss."""

    def way(examples: list[Example], which: int | None) -> torch.Tensor:
        return summed_loss(model, head, _to(collator(_labelled(examples, which)), _device(model)))

    return way


def first_rows(dataset: Any, run_tokens: float) -> list[Example]:
    """The first rows of the data and the longest, cut where trying them would cost more than 1 % of the run."""
    most = max(TOKENS, int(0.01 * 3 * run_tokens / PASSES / EXAMPLES))
    numbers = dict.fromkeys([*range(min(EXAMPLES - 1, len(dataset))), int(dataset.lengths.argmax())])
    rows = beginnings([dataset[number] for number in numbers], min(most, LONGEST))
    # a rope of type "dynamic" keeps the frequencies of a longer one
    return sorted(rows, key=lambda row: len(row["input_ids"]))


def beginnings(rows: list[Example], tokens: int) -> list[Example]:
    """So many tokens of each row, some of them trained: all of the last half where a prompt fills the beginning."""
    examples = []
    for row in rows[:EXAMPLES]:
        ids, labels = row["input_ids"][:tokens].clone(), row["labels"][:tokens].clone()
        if (labels[1:] != IGNORE_INDEX).sum() < 4:
            labels[len(ids) // 2 :] = ids[len(ids) // 2 :]
        if len(ids) <= 4:  # too short to change a part of it
            ids, labels = ids.repeat(4), labels.repeat(4)
        examples.append({"input_ids": ids, "labels": labels})
    return examples * EXAMPLES if len(examples) == 1 else examples


def _labelled(examples: list[Example], which: int | None) -> list[Example]:
    """The examples with the labels of one of them only, or of all (None)."""
    return [
        one if which in (None, number) else one | {"labels": one["labels"] * 0 + IGNORE_INDEX}
        for number, one in enumerate(examples)
    ]


def _trained(examples: list[Example]) -> int:
    return sum(int((one["labels"][1:] != IGNORE_INDEX).sum()) for one in examples)


def _early(example: Example) -> Example:
    """The example with labels in the first half of its trained part only."""
    trained = (example["labels"] != IGNORE_INDEX).nonzero().flatten()
    labels = example["labels"].clone()
    labels[trained[(len(trained) + 1) // 2] if len(trained) > 1 else len(labels) :] = IGNORE_INDEX
    return example | {"labels": labels}


def _changed(example: Example, half: bool) -> Example:
    """The example with other tokens in its trained part, or from its last label's on. The prompt stays: it may be shared.

    The last label's token too: it is what is predicted there, and a model that sees one token ahead sees just that.
    """
    trained = (example["labels"] != IGNORE_INDEX).nonzero().flatten()
    start = int(trained[-1] if half else trained[0])
    ids = example["input_ids"].clone()
    ids[start:] = (ids[start:] + 1) % max(2, int(ids.max()) + 1)
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

"""Make every choice of a run once, before a weight is loaded, and print each with its reason."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from sft.arithmetic import Arithmetic, Precision, compute_dtype
from sft.flags import ModelArguments, TrainingArguments
from sft.job import Choice, UserError, rank, say
from sft.model import loading
from sft.plan import memory, memory_ladder
from sft.plan.micro_batch_tokens import fullest_peak, measured_tokens
from sft.plan.proof import Example, NotFinite, Proof, first_rows, in_a_line, prove, rows_for_the_whole
from sft.step import attention, rotary
from sft.step.captured_steps import choose_capture
from sft.step.compiled_layers import choose_compilation, compile_layers, keep_residual_in_compute_type, more_graphs
from sft.step.loss import LIGER, loss_kernel
from sft.step.micro_batches import PackedBatchSampler, Packing, describe
from sft.step.modules import LossHead, exchange
from sft.step.packed_rows import choose_prefixes, measured_share


@dataclass(frozen=True)
class Settled:
    """What a run does, and why."""

    config: PreTrainedConfig
    device: torch.device
    parameters: int
    arithmetic: Arithmetic
    precision: Precision
    attention: Choice
    compilation: Choice  # of the decoder layers
    capture: Choice  # of steps
    kernel: Callable  # computes the losses: sft/step/loss.py
    liger: bool  # norms and MLPs are Liger's kernels
    prefixes: Choice
    sampler: PackedBatchSampler | None  # the run's micro-batches; None with --train_sampling_strategy
    packing: Packing | None  # what they hold; None in a padded run
    proofs: list[Proof]  # that examples are computed together as each alone
    # rows for the whole model, before the first step; none where it is split or that is dear
    whole_tried_on: list[Example]
    memory_plan: memory.Plan | None  # for these micro-batches

    def record(self) -> dict[str, dict[str, Any]]:
        """The sections of run_report.json that tell it."""
        sections: dict[str, dict[str, Any]] = {"batch": asdict(self.arithmetic), "precision": self.precision.record()}
        sections["proof"] = {"tried": [proof._asdict() for proof in self.proofs]}
        sections["attention"] = {"name": self.attention.value, "reason": self.attention.reason}
        if self.packing:
            lines = {"line": str(self.packing), "shared_prefixes": str(self.prefixes)}
            sections["packing"] = asdict(self.packing) | lines
        if self.memory_plan:
            sections["memory_plan"] = self.memory_plan.record()
        return sections


def engine(args: TrainingArguments) -> str:
    """What divides a run among its ranks: DDP (also one process alone), FSDP, or DeepSpeed with its stage."""
    if args.deepspeed:
        return f"DeepSpeed ZeRO {args.hf_deepspeed_config.get_value('zero_optimization.stage', 0)}"
    return "FSDP" if args.fsdp else "DDP"


def settle(model_args: ModelArguments, args: TrainingArguments, dataset: Any) -> Settled:
    """Make every choice of a run and print each with its reason. All ranks call it together.

    Nothing is loaded. On a GPU `--tokens_per_micro_batch auto` is measured here, on a small model of the same shape.
    """
    config, lengths = loading.load_config(model_args), dataset.lengths
    arithmetic, precision = Arithmetic.of(args, len(dataset)), Precision.of(model_args, args)
    say(f"{arithmetic.lines(len(dataset), args.device.type)}\n{precision}" if args.do_train else precision)
    with loading.whole_models(args):
        skeleton = loading.skeleton(model_args, config)
    parameters = skeleton.num_parameters()
    run_tokens = arithmetic.steps * arithmetic.examples_per_step * lengths.mean() if args.do_train else 0
    kernel_of_attention, proofs = packed_or_padded(model_args, args, config, first_rows(dataset, run_tokens), lengths)
    whole_tried_on: list[Example] = []
    if not args.do_train:
        say(in_a_line(proofs))
    elif engine(args) not in ("FSDP", "DeepSpeed ZeRO 3"):
        whole_tried_on = rows_for_the_whole(dataset, parameters, run_tokens, args.device.type)
    compilation = Choice("compiled layers", False, "--packing False")
    if args.packing:
        compilation = choose_compilation(args, parameters, model_args.load_in_4bit, run_tokens)
        say(compilation)
    kernel, loss = loss_kernel(args.device, compilation.value, args.label_smoothing_factor)
    liger = loss.value == LIGER and engine(args) == "DDP" and args.world_size == 1 and not args.use_liger_kernel
    if args.packing and args.device.type == "cuda":
        say(loss)
    dropout = any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in skeleton.modules())
    dropout |= getattr(config, "attention_dropout", 0.0) > 0 or (model_args.use_lora and model_args.lora_dropout != 0)
    dropout |= getattr(config, "output_router_logits", False)  # its mean is over the tokens of a row
    longer = longer_than_rope(config, lengths) > 0
    prefixes = choose_prefixes(args, config, kernel_of_attention.value, dropout, longer)

    def prepare(probe: PreTrainedModel) -> LossHead:
        return _prepare(probe, args.device, kernel, compilation, liger)

    def sampler_within(tokens: int) -> PackedBatchSampler:
        return PackedBatchSampler.of(args, lengths, arithmetic, max_tokens=tokens)

    def memory_plan_of(*step: Any) -> memory.Plan | None:
        with loading.whole_models(args):  # layers are built to be measured
            return memory_ladder.plan(model_args, args, config, *step)

    if not args.packing:
        sampler, packing = None, None
        capture = Choice("captured steps", False, "--packing False")
        if args.train_sampling_strategy == "random":
            padded = args.per_device_train_batch_size
            sampler = PackedBatchSampler.of(args, lengths, arithmetic, padded=padded)
        memory_plan = memory_plan_of()
    else:
        step_tokens = sampler_within(int(lengths.sum(dtype="int64"))).fullest()
        asked = memory_plan_of(step_tokens, compilation.value)
        budget = _token_budget(model_args, args, config, kernel_of_attention.value, step_tokens, prepare, asked)
        sampler = sampler_within(budget.value)
        padded_run = args.per_device_train_batch_size, args.gradient_accumulation_steps, args.model_max_length
        packing = describe(sampler, *padded_run, budget.reason)
        memory_plan = asked and asked.at(packing.fullest, packing.micro_batches)
        step = arithmetic.examples_per_step * lengths.mean() / args.world_size, packing.micro_batches
        cannot = {
            "dropout or noise is drawn": dropout or args.neftune_noise_alpha,
            "4-bit weights": model_args.load_in_4bit,
            "rope asks for each example's length": rotary.changes_beyond(config) is not None,
        }
        why = next((why for why, holds in cannot.items() if holds), "")
        capture = choose_capture(args, parameters, config.num_hidden_layers, *step, why)
        if args.device.type == "cuda" and args.do_train:
            say(capture)
    gathered = choose_gathered(args, memory_plan)
    if gathered and gathered.value:
        args.fsdp_plugin_args["reshard_after_forward"] = False
        memory_plan = memory_plan and memory_plan.keeping_gathered()
    if gathered and args.do_train:
        say(gathered)
    if memory_plan and args.do_train:
        say(memory_ladder.describe(memory_plan))
    if packing and args.do_train:
        say(packing)
        if prefixes.value:
            first = ([dataset[index] for index in batch] for batch in islice(sampler, 4))
            prefixes = prefixes._replace(reason=f"{prefixes.reason}: {measured_share(first)}")
        say(prefixes)
    return Settled(
        config=config,
        device=args.device,
        parameters=parameters,
        arithmetic=arithmetic,
        precision=precision,
        attention=kernel_of_attention,
        compilation=compilation,
        capture=capture,
        kernel=kernel,
        liger=liger,
        prefixes=prefixes,
        sampler=sampler,
        packing=packing,
        proofs=proofs,
        whole_tried_on=whole_tried_on,
        memory_plan=memory_plan,
    )


def choose_gathered(args: TrainingArguments, plan: memory.Plan | None) -> Choice | None:
    """Whether FSDP2 keeps the weights that a forward pass has gathered until its backward pass, in place of gathering them again.

    No number changes. None where nothing is to be chosen: another engine, or --fsdp_config keeps them already.
    """
    what = "gathered weights kept for the backward pass"
    resharded = (args.fsdp_plugin_args or {}).get("reshard_after_forward")
    if resharded is not True or engine(args) != "FSDP" or args.world_size == 1:
        return None
    if args.keep_gathered_weights is not None:
        return Choice(what, args.keep_gathered_weights, "--keep_gathered_weights")
    if plan is None or args.device.type != "cuda":
        return Choice(what, False, "no memory plan says that there is room" if plan is None else "not on a CPU")
    kept = plan.keeping_gathered()
    room = f"{(kept.gpu_peak - plan.gpu_peak) / memory.GIB:.1f} GiB more on each GPU"
    return Choice(what, kept.has_spare_room, room + ("" if kept.has_spare_room else ", which are not there"))


def longer_than_rope(config: PreTrainedConfig, lengths: Any) -> int:
    """How many examples are longer than the length above which rope's frequencies are others."""
    limit = rotary.changes_beyond(config)
    return 0 if limit is None else int((lengths > limit).sum())


def refuse_padded_rope(args: TrainingArguments, config: PreTrainedConfig, lengths: Any) -> None:
    """Raise a UserError unless each example is alone in its batch: the longest row decides on rope's frequencies for all."""
    if not (longer := longer_than_rope(config, lengths)):
        return
    limit = rotary.changes_beyond(config)
    dynamic = config.rope_parameters.get("rope_type") == "dynamic"  # it keeps those of an earlier, longer batch as well
    if dynamic or max(args.per_device_train_batch_size, args.per_device_eval_batch_size) > 1:
        alone = "" if dynamic else ", give --per_device_train_batch_size 1 --per_device_eval_batch_size 1"
        raise UserError(
            f"{longer:,} of {len(lengths):,} examples are longer than {limit:,} tokens, above which this model's rope takes other "
            f"frequencies, and in a padded run the longest example decides for others too. Leave --packing False out{alone}, or give "
            f"--model_max_length {limit}."
        )


def packed_or_padded(
    model_args: ModelArguments, args: TrainingArguments, config: PreTrainedConfig, examples: list[Example], lengths: Any
) -> tuple[Choice, list[Proof]]:
    """The attention kernel, and the proofs that examples are computed with it as each is alone.

    A model that cannot be packed is padded, with the reason printed; `args.packing` is set to match.

    Raises:
        UserError: it can be computed in neither way.
    """
    why: str | None
    if args.packing:
        try:
            with loading.whole_models(args):
                choice = attention.choose_attention(
                    config, args.device, compute_dtype(args), model_args.attn_implementation
                )
            if choice.value == attention.TRITON:
                from sft.step import attention_kernel  # noqa: F401  its operator; a CPU's PyTorch comes without Triton
        except Exception as error:  # of a config that has no such heads
            why = in_words(error)
        else:
            proofs, why = _proved(model_args, args, config, examples, choice.value)
        if why is None:
            say(choice)
            return choice, proofs
        pad_instead(model_args, args, why)
    refuse_padded_rope(args, config, lengths)
    proofs, why = _proved(model_args, args, config, examples, None)
    if why:
        raise UserError(
            f"{model_args.model_name_or_path}: this model cannot be trained right here, not even padded: {why}."
        )
    asked = model_args.attn_implementation
    choice = Choice("attention", asked, "--attn_implementation" if asked else "transformers' choice for padded batches")
    return choice, proofs


def pad_instead(model_args: ModelArguments, args: TrainingArguments, why: str) -> None:
    """Make a run that cannot be packed a padded one, and print why. Raises a UserError where packing was asked for by hand."""
    if model_args.attn_implementation:
        raise UserError(
            f"--attn_implementation {model_args.attn_implementation} cannot be used with packing: {why}. Leave the flag out."
        )
    if args.packing_asked:
        raise UserError(f"--packing True: {why}. Remove the flag, and the run is padded.")
    say(f"packing: off, this run is padded: {why}")
    args.packing = False


def _proved(*how: Any) -> tuple[list[Proof], str | None]:
    """The proofs that rank 0 makes, and what is wrong, in words; all ranks together: they must decide alike."""
    found: list[Any] = [[], None]
    if rank() == 0:
        try:
            proofs = prove(*how)
            found = [proofs, proofs[-1].fault and f"{proofs[-1].fault}, with {proofs[-1].weights}"]
        except NotFinite as error:
            found[1] = error.problems
        except Exception as error:  # of a kernel or a model that these rows do not fit: the reason is printed
            found[1] = in_words(error)
    if torch.distributed.is_initialized():
        torch.distributed.broadcast_object_list(found)
    if isinstance(found[1], list):
        raise UserError(found[1])
    return found[0], found[1]


def in_words(error: Exception) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}".splitlines()[0]


def _token_budget(
    model_args: ModelArguments,
    args: TrainingArguments,
    config: PreTrainedConfig,
    kernel_of_attention: str,
    largest_step: int,
    prepare: Callable[[PreTrainedModel], LossHead],
    memory_plan: memory.Plan | None,
) -> Choice:
    """Most tokens of a micro-batch: asked for, the padded run's number, or on a GPU as many as memory has room for."""
    what, floor = "tokens per micro-batch", args.per_device_train_batch_size * args.model_max_length
    ceiling = min(largest_step, memory.LARGEST_BUDGET)
    if args.tokens_per_micro_batch is not None:
        return Choice(what, args.tokens_per_micro_batch, "--tokens_per_micro_batch")
    if args.device.type != "cuda" or not args.do_train or kernel_of_attention in ("sdpa", "eager"):
        return Choice(what, floor, "per device x --model_max_length")
    if ceiling <= floor:
        return Choice(what, floor, "per device x --model_max_length, more than any step has")
    if memory_plan is None:
        return Choice(what, floor, "per device x --model_max_length; without a memory plan it does not grow")
    return measured_tokens(model_args, args, config, kernel_of_attention, floor, ceiling, prepare, memory_plan)


def prepare_step(model: PreTrainedModel, settled: Settled) -> LossHead | None:
    """Exchange modules and compile layers as settled, for packed rows.

    Returns: the output layer, which gives the loss; None in a padded run.
    """
    how = settled.device, settled.kernel, settled.compilation, settled.liger
    return _prepare(model, *how) if settled.packing else None


def rehearse_fullest(
    model: PreTrainedModel, head: LossHead | None, settled: Settled, args: TrainingArguments, lengths: Any
) -> Settled:
    """On one GPU run the fullest micro-batch before the first step, with memory taken for the optimizer's state: it fits, or steps are divided.

    The weights move to the GPU here, and nothing is updated. Returns what is settled now.
    """
    plan = settled.memory_plan
    one_gpu = args.device.type == "cuda" and args.world_size == 1 and engine(args) == "DDP" and not args.torch_compile
    if head is None or plan is None or settled.packing is None or not (one_gpu and args.do_train):
        return settled
    if model.device.type != "cuda":
        model.to(args.device)
    while True:
        tokens, several = settled.packing.fullest, settled.packing.micro_batches > 1
        try:
            with torch.random.fork_rng([args.device]), more_graphs():
                peak = fullest_peak(model, head, tokens, 1 + several, plan.gpu["optimizer"], args)
        except torch.OutOfMemoryError:
            model.zero_grad()
            torch.cuda.empty_cache()
            if tokens <= lengths.max():
                raise
        else:
            say(f"rehearsed: a micro-batch of {tokens:,} tokens peaks at {peak / memory.GIB:.1f} GiB on the GPU")
            return settled
        sampler = PackedBatchSampler.of(args, lengths, settled.arithmetic, max_tokens=tokens - 1)
        why = f"{tokens:,} tokens did not fit when they were tried"
        was = settled.packing
        packing = describe(sampler, was.per_device, was.accumulation, was.max_length, why)
        plan = plan.at(packing.fullest, packing.micro_batches)
        capture = settled.capture._replace(value=False, reason="several micro-batches in a step")
        settled = replace(settled, sampler=sampler, packing=packing, memory_plan=plan, capture=capture)
        say(packing)


def _prepare(
    model: PreTrainedModel, device: torch.device, kernel: Callable, compilation: Choice, liger: bool
) -> LossHead:
    cuda = device.type == "cuda"
    head = exchange(model, kernel, fused_norms=compilation.value and cuda, liger=liger)
    if cuda:
        keep_residual_in_compute_type(model)
    if compilation.value:
        compile_layers(model, fused_norms=cuda)
    return head

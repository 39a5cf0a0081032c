"""The Trainer, and the things of a run that join several rooms: what a micro-batch holds, what is watched, what is saved.

Beside commands (`generate`, `report`) the one room that imports others. `utils.train` calls it in the order of a run.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from accelerate.utils import DistributedType
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, Trainer
from transformers.trainer_utils import EvalLoopOutput

from sft.arithmetic import compute_dtype, export_dtype, plan
from sft.data import token_cache
from sft.data.template import TEMPLATE_FILE, load_template
from sft.flags import DataArguments, ModelArguments, TrainingArguments
from sft.job import all_ranks_or_none, say
from sft.model import loading, lora, safe_loads
from sft.plan import memory, memory_ladder, micro_batch_tokens
from sft.report.progress import ReportCallback, replace_progress
from sft.report.record import Report
from sft.report.speed import Meter, ModelFlops, device_name
from sft.run.evaluation import AnswersCallback, EarlyStop, EvalBatchSampler, token_weighted_loop
from sft.run.stop_requests import Stops
from sft.saving import checkpoint, export
from sft.saving.rehearsal import Rehearsal
from sft.saving.resume import keep_token_budget, refuse_changes, run_identity, saved_identity
from sft.step import attention, compiled_layers, micro_batches, packed_rows
from sft.step.counts import CountingCollator, take_counts
from sft.step.loss import choose_loss, summed_loss
from sft.step.micro_batches import PackedBatchSampler
from sft.step.modules import labelled_head, labelled_layer
from sft.step.packed_rows import PackedCollator
from sft.step.weight_copies import Casts, keeps_casts

# Engines under which each rank has the whole gradients.
PLAIN_ENGINES = (DistributedType.NO, DistributedType.MULTI_GPU, DistributedType.MULTI_CPU)


class SupervisedTrainer(Trainer):
    """The stock Trainer with packed micro-batches, an exact evaluation loss, counted tokens, and checkpoints that are whole."""

    data_collator: Callable[[list], dict]
    meter: Meter  # set by `watch`, like the report
    report: Report
    stops: Stops  # set by `prepare_saving`, like the fingerprint
    fingerprint: dict[str, str]
    memory_plan: memory.Plan | None = None
    model_args: ModelArguments  # set by `prepare_saving`
    packing_plan: micro_batches.Plan | None = None
    _globalstep_last_logged: int
    sampler: PackedBatchSampler | None = None
    asked = False  # `stops` has sent this step's numbers to the host
    ahead: tuple[Any, Any] = (None, None)  # an epoch's iterator, and the next step's micro-batches from it
    before_writing: Callable[[dict], dict] | None = None  # sees, and may change, the weights about to be written

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.accumulation_asked = self.args.gradient_accumulation_steps
        if self.accelerator.distributed_type == DistributedType.FSDP:
            plugin = self.accelerator.state.fsdp_plugin
            if isinstance(plugin.mixed_precision_policy, MixedPrecisionPolicy):
                # Accelerate (1.15) has FSDP2 cast what the model returns to 16 bits: the loss, and the scale of its gradient
                plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)
        if self.args.packing:
            self.prefixes = packed_rows.choose_prefixes(self.args, self.model, attention.SHARE_PREFIXES)
            self.packed_collator = self.data_collator = PackedCollator(
                packed_rows.group_by_prefix if self.prefixes.on else None
            )
            self.head = labelled_head(self.model)
            labelled_layer(self.model)

    def _get_train_sampler(self, train_dataset=None):
        if not self.args.packing and self.args.train_sampling_strategy != "random":
            return super()._get_train_sampler(train_dataset)
        if self.sampler is None:
            self.sampler = plan_micro_batches(self)
        return self.sampler

    def get_train_dataloader(self) -> DataLoader:
        dataloader = super().get_train_dataloader()
        wrapper = dataloader.batch_sampler  # on several ranks Accelerate's, which loses the epoch after a resume
        if self.sampler is not None and wrapper is not self.sampler:
            wrapper.set_epoch = self.sampler.set_epoch
        return dataloader

    def get_total_train_batch_size(self, args) -> int:
        return args.per_device_train_batch_size * self.accumulation_asked * args.world_size

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not self.args.packing:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # num_items_in_batch counts the step's tokens on all ranks, over which the gradients will be averaged
        loss = summed_loss(model, self.head, inputs)
        return loss * (self.accelerator.num_processes / num_items_in_batch)

    def _run_epoch(self, **kwargs) -> None:
        # transformers 5.23 resumes a run at its end with one step more
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(**kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.stops.saw(inputs, loss)
        # the step's last micro-batch: the GPU has work in hand, and the next examples are gathered meanwhile
        if self.accelerator.sync_gradients:
            self.ahead = (self.source[0], super().get_batch_samples(*self.source))
        return loss

    def _clip_grad_norm(self, model):
        if self.accelerator.distributed_type not in PLAIN_ENGINES or self.args.fp16:
            return super()._clip_grad_norm(model)
        # torch's `clip_grad_norm_` in its two halves: the host waits for the norm alone, while the gradients are scaled
        weights = [weight for weight in model.parameters() if weight.grad is not None]
        grad_norm = torch.nn.utils.get_total_norm([weight.grad for weight in weights])
        self.stops.ask(self, grad_norm, self.meter.own())
        self.asked = True
        torch.nn.utils.clip_grads_with_norm_(weights, self.args.max_grad_norm, grad_norm)
        return grad_norm

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm)
        if not self.asked:
            self.stops.ask(self, grad_norm, self.meter.own())
        self.asked = False
        return self.stops.before_update(self, grad_norm)

    def _maybe_log_save_evaluate(
        self, tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate=None
    ) -> None:
        """As the stock one, which asks the GPU for the loss and so waits for the optimizer; `stops` has it already."""
        steps = self.state.global_step - self._globalstep_last_logged
        if self.control.should_log and steps > 0:
            loss, self.stops.loss_since_log = self.stops.loss_since_log, 0.0
            tr_loss.zero_()
            self._total_loss_scalar += loss
            self._globalstep_last_logged = self.state.global_step
            logs = {"loss": loss / steps, "grad_norm": grad_norm, "learning_rate": learning_rate}
            self.log({name: value for name, value in logs.items() if value is not None}, start_time)
        super()._maybe_log_save_evaluate(
            tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate
        )

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        (fetched_from, fetched), self.ahead = self.ahead, (None, None)
        if fetched_from is not epoch_iterator:
            fetched = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.source = (epoch_iterator, num_batches, device)
        batches, num_items_in_batch = fetched
        counts = take_counts(batches)
        self.meter.add_step(counts)
        self.current_flos += self.meter.flops.step(counts)
        return batches, num_items_in_batch

    def floating_point_ops(self, inputs) -> int:
        return 0  # counted above, from the examples' lengths; the stock one walks all parameters in each micro-batch

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self.meter.read())  # before the trackers and the log history see them
        super().log(logs, start_time)

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        size = {"max_examples": self.args.per_device_eval_batch_size}
        if self.args.packing:
            tokens = self.args.per_device_eval_batch_size * self.args.model_max_length
            size = {"max_tokens": max(tokens, self.sampler.max_tokens if self.sampler else 0)}
        sampler = EvalBatchSampler(dataset.lengths, self.args.world_size, self.args.process_index, **size)
        return DataLoader(dataset, batch_sampler=sampler, collate_fn=self.data_collator)

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        return token_weighted_loop(self, dataloader, self.loss_sum, metric_key_prefix)

    def loss_sum(self, model: torch.nn.Module, inputs: dict) -> torch.Tensor:
        """The loss summed over the trained tokens of one micro-batch."""
        # compute_loss divides by the step's tokens, and multiplies by the ranks whose mean the gradient will be
        ranks = self.args.world_size if self.args.average_tokens_across_devices else 1
        one = torch.ones((), device=self.args.device)
        return self.compute_loss(model, inputs, num_items_in_batch=one) / ranks

    def create_model_card(self, **kwargs) -> None:
        """push_to_hub's draft is left out: the card made from the report is in the folder already."""

    def _save_checkpoint(self, model, trial) -> None:
        run = self.fingerprint
        if self.args.packing:
            run = run | {"tokens_per_micro_batch": str(self.sampler.max_tokens)}
        with self.report.phase("checkpoints"):
            checkpoint.save_whole(self, run, partial(super()._save_checkpoint, model, trial))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.before_writing and self.args.should_save:
            state_dict = self.before_writing(self.model.state_dict() if state_dict is None else state_dict)
        with safe_loads.without_secrets(self.args, output_dir):
            super()._save(output_dir, state_dict)


def plan_micro_batches(trainer: SupervisedTrainer) -> PackedBatchSampler:
    """Decide what each micro-batch of the run holds and how it is computed, set the accumulation to match, and say all."""
    args, model, dtype = trainer.args, trainer.model, compute_dtype(trainer.args)
    arithmetic, lengths = plan(args, len(trainer.train_dataset)), trainer.train_dataset.lengths
    recipe = micro_batches.recipe(args, lengths, **arithmetic)
    if not args.packing:
        return PackedBatchSampler(**recipe, max_tokens=0, padded=args.per_device_train_batch_size)
    run_tokens = arithmetic["steps"] * arithmetic["examples_per_step"] * lengths.mean()
    compiled = compiled_layers.choose_compilation(
        args, model.num_parameters(), getattr(model, "is_quantized", False), run_tokens
    )
    say(compiled)

    def prepare(model: PreTrainedModel) -> None:
        if compiled.on and args.device.type == "cuda":
            from sft.step.norm_kernel import fuse_norms  # Triton is there: it compiles the layers

            fuse_norms(model)
        autocasts = trainer.accelerator.distributed_type in PLAIN_ENGINES and dtype != torch.float32
        if autocasts and keeps_casts(args):
            trainer.add_callback(Casts(model, labelled_head(model), dtype))
        compiled_layers.prepare_layers(model, args.device, compiled)

    prepare(model)
    loss = choose_loss(args.device, compiled.on)
    if args.device.type == "cuda":
        say(f"head and loss: {loss}")

    def prepare_probe(probe: PreTrainedModel) -> torch.nn.Module:
        prepare(probe)
        return labelled_head(probe)

    largest, tokens = micro_batches.largest_step(recipe), args.per_device_train_batch_size * args.model_max_length
    ceiling, reason = min(largest, memory.LARGEST_BUDGET), "per device x --model_max_length"
    if args.tokens_per_micro_batch != "auto":
        tokens, reason = int(args.tokens_per_micro_batch), "--tokens_per_micro_batch"
    elif args.device.type != "cuda" or model.config._attn_implementation in ("sdpa", "eager"):
        pass
    elif ceiling <= tokens:
        reason += ", more than any step has"
    elif trainer.memory_plan is None:
        reason += "; without a memory plan it does not grow"
    else:
        _, tokens, reason = micro_batch_tokens.measured_tokens(
            trainer.model_args,
            args,
            loading.load_config(trainer.model_args),
            trainer.model_args.attn_implementation,
            tokens,
            ceiling,
            prepare_probe,
            trainer.memory_plan,
        )
        loading.start_deepspeed(args)
    sampler = micro_batches.within(recipe, tokens)
    sampler = micro_batches.within(recipe, tokens.tokens)
    trainer.packing_plan = packed = micro_batches.describe(
        sampler,
        args.per_device_train_batch_size,
        args.gradient_accumulation_steps,
        args.model_max_length,
        reason,
    )
    say(packed)
    first = ([trainer.train_dataset[index] for index in batch] for batch in islice(sampler, 4))
    trainer.prefixes = packed_rows.with_measured_share(trainer.prefixes, first)
    say(trainer.prefixes)
    trainer.report.note("packing", **asdict(packed), line=str(packed), shared_prefixes=str(trainer.prefixes))
    micro_batches.set_accumulation(args, sampler)
    return sampler


def choose_attention(model_args: ModelArguments, training_args: TrainingArguments) -> str:
    """Set the kernel for packed rows, and say and return why this one. Padded batches have transformers' own choice."""
    if not training_args.packing:
        return "--attn_implementation" if model_args.attn_implementation else "transformers' choice for padded batches"
    config, dtype = loading.load_config(model_args), compute_dtype(training_args)
    choice = attention.choose_attention(config, training_args.device, dtype, model_args.attn_implementation)
    if choice.name == attention.TRITON:
        from sft.step import attention_kernel  # noqa: F401  its operator; a CPU's PyTorch comes without Triton
    model_args.attn_implementation = choice.name
    say(choice)
    return choice.reason


def plan_memory(model_args: ModelArguments, args: TrainingArguments, lengths: np.ndarray) -> memory.Plan | None:
    """Say what the run will hold on each GPU and in the host, before a weight is loaded."""
    shape = memory.Shape.of(loading.load_config(model_args), model_args.lora_target_modules)
    step_tokens, compiled = None, False
    if args.packing and shape is not None:
        arithmetic = plan(args, len(lengths))
        step_tokens = micro_batches.largest_step(micro_batches.recipe(args, lengths, **arithmetic))
        run_tokens = arithmetic["steps"] * arithmetic["examples_per_step"] * lengths.mean()
        compiled = compiled_layers.choose_compilation(args, shape.parameters, model_args.load_in_4bit, run_tokens).on
    found = memory_ladder.plan(model_args, args, shape, step_tokens, compiled)
    if found is not None:
        say(memory_ladder.describe(found))
    return found


def watch(trainer: SupervisedTrainer, report: Report) -> None:
    """Count tokens, print the live line, keep the record, answer the evaluation prompts, stop early if asked to."""
    args, trainer.report = trainer.args, report
    trainer.data_collator = CountingCollator(trainer.data_collator)
    trainer.meter = Meter(
        ModelFlops.of(trainer.model),
        args.device,
        device_name(args.device),
        compute_dtype(args),
        gather=lambda _: trainer.stops.counts,
    )
    callbacks: list[transformers.TrainerCallback] = []
    if trainer.eval_dataset is not None and args.eval_samples:
        generating = attention.stock_attention if args.packing else nullcontext
        keep = report.record["samples"].append
        callbacks.append(AnswersCallback(trainer.eval_dataset, args.eval_samples, keep, generating))
    if args.early_stopping_patience:
        callbacks.append(EarlyStop(args.early_stopping_patience))
    replace_progress(trainer, *callbacks, ReportCallback(report), trainer.meter)


def prepare_saving(
    trainer: SupervisedTrainer, model_args: ModelArguments, data_args: DataArguments, resume: str | None
) -> None:
    """Refuse to continue another run than this one, watch for stops, and rehearse the saving before the first step."""
    trainer.model_args = model_args
    before = saved_identity(resume) if resume else {}
    keep_token_budget(resume, before, trainer.args)
    tokenizer = token_cache.tokenizer_digest(trainer.processing_class)
    trainer.fingerprint = run_identity(trainer, model_args, load_template(data_args.prompt_template), tokenizer)
    if resume:
        refuse_changes(resume, before, trainer.fingerprint, trainer.args.resume_with_changes)
    trainer.stops = Stops()
    trainer.add_callback(trainer.stops)
    if trainer.args.save_rehearsal:
        trainer.add_callback(Rehearsal(trainer, export_dtype(trainer.args), trainer.report.add_seconds))


def export_model(trainer: SupervisedTrainer, model_args: ModelArguments, data_args: DataArguments) -> list[str]:
    """Write the tuned model, its tokenizer and its prompt template for plain transformers; return what was proved of them."""
    args, proved = trainer.args, []
    failing = checkpoint.exit_on_failed_save(Path(args.output_dir, "model"))
    with trainer.report.phase("save"), failing, memory_ladder.explain_out_of_memory(trainer.memory_plan):
        exporter = export.Exporter(trainer, model_args, export_dtype(args))
        if model_args.use_lora:
            saved = lora.save(trainer, model_args, export_dtype(args))
        else:
            saved = exporter.save_whole_model()
        if args.should_save:
            template = load_template(data_args.prompt_template)
            Path(args.output_dir, TEMPLATE_FILE).write_text(template, encoding="utf-8")
    with trainer.report.phase("proof"), all_ranks_or_none():
        loading.hold_deepspeed(args)  # rank 0 alone reloads: split by ZeRO-3, it would wait for the others for ever
        if args.should_save:
            proved = exporter.prove(saved)
    say(f"model saved in {args.output_dir}; proved: {'; '.join(proved)}")
    return proved

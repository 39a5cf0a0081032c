"""Extend the stock Trainer: packed micro-batches, an exact evaluation loss, counted tokens and one message in each step."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, send_to_device
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import DataLoader
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, set_seed
from transformers.trainer_utils import EvalLoopOutput

from sft import IGNORE_INDEX
from sft.flags import TrainingArguments, checkpoints_are_models
from sft.job import UserError, say
from sft.run.evaluation import EvalBatchSampler, token_weighted_loop
from sft.run.finite_check import explain_non_finite, what_to_try
from sft.run.step_message import StepMessage
from sft.run.stop_requests import StopRequests, ignore_in_worker
from sft.step.captured_steps import CapturedSteps
from sft.step.counts import CountingCollator, take_counts
from sft.step.loss import summed_loss
from sft.step.micro_batches import PackedBatchSampler, set_accumulation


class SupervisedTrainer(Trainer):
    """Whole when it is built: what a run attaches to it are arguments.

    Args:
        args, model, data_collator, …: the stock Trainer's.
        sampler: the run's micro-batches; None leaves them to the stock Trainer.
        head: the model's output layer after `modules.exchange`; None in a padded run.
        captured: the graphs of its steps; None launches each kernel by itself.
        meter: is told of each step's tokens, and adds its numbers to the log (`report.speed.Meter`).
        write_checkpoint: (trainer, the stock saving) -> None; what `_save_checkpoint` does with the stock saving.
        before_first_step: called when the model is wrapped and sharded as in training.
    """

    args: TrainingArguments
    _globalstep_last_logged: int

    def __init__(
        self,
        args: TrainingArguments,
        data_collator: Callable[[list], dict],
        sampler: PackedBatchSampler | None = None,
        head: torch.nn.Module | None = None,
        captured: CapturedSteps | None = None,
        meter: Any = None,
        write_checkpoint: Callable[["SupervisedTrainer", Callable[[], None]], None] | None = None,
        before_first_step: Callable[["SupervisedTrainer"], None] | None = None,
        callbacks: Iterable[TrainerCallback] = (),
        **stock: Any,
    ):
        self.sampler, self.head, self.meter, self.write_checkpoint = sampler, head, meter, write_checkpoint
        self.captured = captured
        self.stops, self.checkpoints_are_models = StopRequests(), checkpoints_are_models(args)
        self.loss_since_log = 0.0  # summed over steps, the mean over ranks
        self.counts: torch.Tensor  # (ranks, numbers): what each rank counted until the last step
        self.source: tuple  # where the next step's micro-batches come from
        self.ahead: tuple[Any, Any] = (None, None)  # an epoch's iterator, and the next step's micro-batches from it
        if sampler:
            set_accumulation(args, sampler.micro_batches)
        every = [*callbacks, self.stops, Intervals()]
        if before_first_step:
            every.append(BeforeFirstStep(partial(before_first_step, self)))
        super().__init__(args=args, data_collator=CountingCollator(data_collator), callbacks=every, **stock)
        self.remove_callback(ProgressCallback)  # a run prints lines of its own
        self.remove_callback(PrinterCallback)
        self.message = StepMessage(args.device, self.accelerator.gather)
        if self.accelerator.distributed_type == DistributedType.FSDP:
            plugin = self.accelerator.state.fsdp_plugin
            if isinstance(plugin.mixed_precision_policy, MixedPrecisionPolicy):
                # Accelerate (1.15) has FSDP2 cast what the model returns to 16 bits: the loss, and the scale of its gradient
                plugin.mixed_precision_policy = replace(plugin.mixed_precision_policy, output_dtype=None)

    # ---- micro-batches

    def get_train_dataloader(self) -> DataLoader:
        if self.sampler is None:
            return super().get_train_dataloader()
        collator = CountingCollator(self.captured.rows) if self.captured else self.data_collator
        return self._loader(self.train_dataset, self.sampler, collator)

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        size = {"max_examples": self.args.per_device_eval_batch_size}
        if self.args.packing:
            tokens = self.args.per_device_eval_batch_size * self.args.model_max_length
            size = {"max_tokens": max(tokens, self.sampler.max_tokens)}
        sampler = EvalBatchSampler(dataset.lengths, self.args.world_size, self.args.process_index, **size)
        return self._loader(dataset, sampler, self.data_collator)

    def _loader(self, dataset, sampler, collator) -> DataLoader:
        args = self.args  # each rank has batches of its own already: nothing for Accelerate to divide
        return DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
            worker_init_fn=ignore_in_worker,
        )

    def get_total_train_batch_size(self, args) -> int:
        return self.sampler.examples_per_step if self.sampler else super().get_total_train_batch_size(args)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        (fetched_from, fetched), self.ahead = self.ahead, (None, None)
        if fetched_from is not epoch_iterator:
            fetched = self._fetch(epoch_iterator, num_batches, device)
        self.source = (epoch_iterator, num_batches, device)
        batches, num_items_in_batch = fetched
        counts = take_counts(batches)
        if self.meter:
            self.current_flos += self.meter.add_step(counts)
        return batches, num_items_in_batch

    def _fetch(self, epoch_iterator, num_batches, device):
        moved = (send_to_device(batch, device, non_blocking=True) for batch in epoch_iterator)
        return super().get_batch_samples(moved, num_batches, device)

    def floating_point_ops(self, inputs) -> int:
        return 0  # counted above, from the examples' lengths; the stock one walks all parameters in each micro-batch

    # ---- one step

    def _run_epoch(self, **kwargs) -> None:
        if self.sampler:
            self.sampler.set_epoch(kwargs["epoch"])
        # transformers 5.23 resumes a run at its end, or past its early stop, with one step more
        if self.state.global_step < self.state.max_steps and not self.control.should_training_stop:
            super()._run_epoch(**kwargs)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # num_items_in_batch counts the step's tokens on all ranks, over which the gradients will be averaged. The model does not
        # get it: FSDP2 casts a tensor on its way in to bfloat16, where 4,353 tokens are 4,352 (transformers 5.23, torch 2.13)
        if self.args.packing:
            loss = summed_loss(model, self.head, inputs)
            return loss * (self.accelerator.num_processes / num_items_in_batch)
        if num_items_in_batch is None:  # the model's loss is a mean: a class of its own that takes no count
            return super().compute_loss(model, inputs)
        share = 1
        if getattr(self.model.config, "output_router_logits", False):
            # the model adds its router's loss once: it counts by the trained tokens of its batch, as in a packed run
            share = int((inputs["labels"][:, 1:] != IGNORE_INDEX).sum())
        loss = super().compute_loss(model, inputs, num_items_in_batch=max(share, 1))
        return loss * share / num_items_in_batch

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        launch = partial(super().training_step, model, inputs, num_items_in_batch)
        loss = self.captured.step(model, inputs, num_items_in_batch, self._pass, launch) if self.captured else launch()
        self.message.add(inputs, loss)
        # the step's last micro-batch: the GPU has work in hand, and the next examples are gathered meanwhile
        if self.accelerator.sync_gradients:
            self.ahead = (self.source[0], self._fetch(*self.source))
        return loss

    def _pass(self, model, inputs, num_items_in_batch) -> torch.Tensor:
        """Forward and backward of a step's only micro-batch, as the stock training step has them."""
        loss = self.compute_loss(model, inputs, num_items_in_batch=num_items_in_batch)
        self.accelerator.backward(loss)
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        """As the stock one, and the step's message: whether to stop, and what to log, is known before the update."""
        grad_norm = super()._get_grad_norm(model, grad_norm)
        # DeepSpeed's ZeRO 3 leaves the last step's norm in place when a gradient is not finite
        zero = self.is_deepspeed_enabled and not self.args.fp16
        overflow = zero and getattr(self.deepspeed.optimizer, "overflow", False)
        counts = self.meter.own() if self.meter else []
        stop = self.stops.requested is not None
        received = self.message.exchange(grad_norm, stop, counts, bool(overflow), norm_may_overflow=self.args.fp16)
        self.stops.agreed, self.counts = received.stop, received.counts
        self.loss_since_log += received.loss
        # a part of the state: checkpoints keep it
        run = self.state.stateful_callbacks.setdefault("RunLoss", {"sum": 0.0, "steps": 0})
        run["sum"], run["steps"] = run["sum"] + received.loss, run["steps"] + 1
        if received.broken:
            self._stop_before_update(received.grad_norm)
        self.message.micro_batches.clear()
        return None if grad_norm is None else received.grad_norm

    def _stop_before_update(self, grad_norm: float) -> None:
        """End the run on all ranks: a number is not finite. The weights are saved as they were before this step."""
        message = explain_non_finite(self, self.message.micro_batches, grad_norm)
        step = self.state.global_step
        if step and not Path(self.args.output_dir, f"checkpoint-{step}").is_dir():
            self._save_checkpoint(self.model_wrapped, None)
        adapter = hasattr(self.model, "peft_config")
        raise UserError(f"{message} {what_to_try(self.args.output_dir, step, adapter)}")

    # ---- what is logged, evaluated and saved

    def _maybe_log_save_evaluate(
        self, tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate=None
    ) -> None:
        """As the stock one, which asks the GPU for the loss and so waits for the optimizer; the step's message had it."""
        steps = self.state.global_step - self._globalstep_last_logged
        if self.control.should_log and steps > 0:
            loss, self.loss_since_log = self.loss_since_log, 0.0
            tr_loss.zero_()
            self._total_loss_scalar += loss
            self._globalstep_last_logged = self.state.global_step
            logs = {"loss": loss / steps, "grad_norm": grad_norm, "learning_rate": learning_rate}
            self.log({name: value for name, value in logs.items() if value is not None}, start_time)
        super()._maybe_log_save_evaluate(
            tr_loss, grad_norm, model, trial, epoch, ignore_keys_for_eval, start_time, learning_rate
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "train_loss" in logs and (run := self.state.stateful_callbacks.get("RunLoss")):
            logs["train_loss"] = run["sum"] / run["steps"]  # the Trainer's (5.23) is the mean since the resume
        if "loss" in logs and self.meter:
            logs.update(self.meter.read(self.counts))  # before the trackers and the log history see them
        super().log(logs, start_time)

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        return token_weighted_loop(self, dataloader, metric_key_prefix)

    def loss_sum(self, model: torch.nn.Module, inputs: dict) -> torch.Tensor:
        """The loss summed over the trained tokens of one micro-batch."""
        # compute_loss divides by the step's tokens, and multiplies by the ranks whose mean the gradient will be
        ranks = self.args.world_size if self.args.average_tokens_across_devices else 1
        return self.compute_loss(model, inputs, num_items_in_batch=1) / ranks

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        # each rank saved its own. On another number of ranks none fits, and no step may draw what the first one drew
        if checkpoint and len([*Path(checkpoint).glob("rng_state*.pth")]) != self.args.world_size:
            set_seed(self.args.seed + self.state.global_step)

    def create_model_card(self, **kwargs) -> None:
        """Skip the Trainer's model card; a run writes its own."""

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As the stock one, but not into a checkpoint of DeepSpeed's: its own files hold the weights, and rank 0 would gather them."""
        if not (_internal_call and self.is_deepspeed_enabled) or self.checkpoints_are_models:
            super().save_model(output_dir, _internal_call)

    def _save_checkpoint(self, model, trial) -> None:
        stock = partial(super()._save_checkpoint, model, trial)
        self.write_checkpoint(self, stock) if self.write_checkpoint else stock()


class Intervals(TrainerCallback):
    """A resumed run logs, evaluates and saves as its own command says; transformers (5.23) goes on as the checkpoint's did."""

    def on_train_begin(self, args, state, control, **kwargs):
        names = ("logging_steps", "eval_steps", "save_steps")
        before = {name: getattr(state, name) for name in names}
        state.compute_steps(args, state.max_steps)
        for name, old in before.items():
            if getattr(state, name) != old:
                say(f"resume: --{name} {getattr(state, name)} from here on; it was {old}")


class BeforeFirstStep(TrainerCallback):
    """Does something when training begins."""

    def __init__(self, action: Callable[[], None]):
        self.action = action

    def on_train_begin(self, args, state, control, **kwargs):
        self.action()

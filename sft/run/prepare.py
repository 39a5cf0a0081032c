"""Attach to the Trainer what a run needs besides the recipe, and do what happens around the training.

The recipe knows none of it. Here the record is kept, checkpoints and the export are written and proved, and errors become sentences.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback

from sft import job
from sft.arithmetic import compute_dtype, export_dtype
from sft.data.checks import check_vocabulary, data_problems, too_many_positions
from sft.data.template import Template, load_template
from sft.data.token_cache import tokenizer_digest
from sft.flags import DataArguments, ModelArguments, TrainingArguments
from sft.job import UserError, all_ranks_or_none, complain, differences_from_rank_0, gather, rank, say
from sft.model import loading, lora, safe_loads
from sft.outside import reading
from sft.plan import memory, proof
from sft.plan.deepspeed_file import check_deepspeed
from sft.plan.memory_ladder import explain_out_of_memory, stop_after_plan
from sft.plan.settle import Settled, engine, in_words, pad_instead, refuse_padded_rope
from sft.report.progress import ReportCallback, tracker_problems
from sft.report.record import Report
from sft.report.speed import Meter, ModelFlops, peak_tflops
from sft.run.evaluation import AnswersCallback, EarlyStop, evaluation_problems, without_training
from sft.run.finite_check import LossSpikes
from sft.run.stop_requests import command_to_continue
from sft.run.trainer import SupervisedTrainer
from sft.saving import checkpoint, export, resume
from sft.saving.model_card import write_card
from sft.saving.rehearsal import refuse_full_disk, rehearse
from sft.step import attention, compiled_layers
from sft.step.captured_steps import CapturedSteps, FilledRows
from sft.step.micro_batches import set_accumulation
from sft.step.modules import LossHead
from sft.step.packed_rows import PackedCollator, group_by_prefix


def plan_only(flags) -> list[str]:
    """With --plan_only print the memory plan and end the run. Raises a UserError with what keeps it from being made."""
    if flags.plan_only:
        raise UserError(stop_after_plan(flags))
    return []


CHECKS = (  # what can be known from the flags alone; all problems are raised together
    plan_only,
    without_training,
    data_problems,
    loading.model_problems,
    loading.liger_problems,
    resume.output_dir_problems,
    check_deepspeed,
    lora.lora_problems,
    evaluation_problems,
    tracker_problems,
)


class NotPacked(Exception):
    """The whole model is not computed right in packed rows, and the run's flags are a padded run's now."""


class Run:
    """One run's flags and record, from the parsed command line to the exported model.

    Raises:
        SystemExit: 0, if --resume_from_checkpoint finds a finished model and nothing is left to do.
    """

    def __init__(self, model_args: ModelArguments, data_args: DataArguments, args: TrainingArguments):
        self.model_args, self.data_args, self.args = model_args, data_args, args
        if export.is_already_finished(args):
            raise SystemExit(0)
        if rank() != 0:  # transformers' warnings come from rank 0 alone, and its progress bars go to a terminal only
            transformers.utils.logging.set_verbosity_error()
        if rank() != 0 or not sys.stderr.isatty():
            transformers.utils.logging.disable_progress_bar()
        self.report = Report(model_args, data_args, args)
        self.template: Template
        self.memory_plan: memory.Plan | None = None
        self.identity: dict[str, str] = {}
        self.before: dict[str, str] = {}  # the identity of the run that wrote the checkpoint
        self.resume: str | None = None
        self.lock: Any = None  # of the output folder
        job.when_interrupted(self._where_it_stands)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time a part of the run for its record, and end an out-of-memory in a sentence."""
        with self.report.phase(name), explain_out_of_memory(self.memory_plan, name):
            yield

    def read_tokenizer(self, load: Callable[[ModelArguments], PreTrainedTokenizerBase]) -> PreTrainedTokenizerBase:
        with reading(f"{self.model_args.model_name_or_path}: the tokenizer's files"):
            return load(self.model_args)

    def resume_from(self, data_module: dict[str, Any]) -> str | None:
        """The checkpoint that this run continues from, if any. All ranks together.

        Raises:
            UserError: token ids have no embedding, or another run made the checkpoint.
        """
        self.report.enter("plan")
        tokenizer = data_module["data_collator"].tokenizer
        template = load_template(self.data_args.prompt_template, tokenizer, bool(self.data_args.messages))
        self.template = replace(template, control_tokens=self.data_args.allow_control_tokens)
        with all_ranks_or_none():
            config = loading.load_config(self.model_args)
            problems = check_vocabulary(tokenizer, config)
            for dataset in filter(None, (data_module["train_dataset"], data_module["eval_dataset"])):
                positions, refused = too_many_positions(config, dataset.lengths)
                problems += [positions] * refused
                if positions and not refused:
                    say(f"warning: {positions}")
            if problems:
                raise UserError(problems)
            self.lock = checkpoint.hold_output_dir(self.args.output_dir)
        if not self.args.do_train:
            return None
        self.resume = resume.choose_checkpoint(self.args)
        self.before = resume.saved_identity(self.resume) if self.resume else {}
        longest = int(data_module["train_dataset"].lengths.max())
        resume.keep_padding(self.resume, self.before, self.args)
        resume.keep_token_budget(self.resume, self.before, self.args, longest)
        resume.keep_layout(self.resume, self.args)
        return self.resume

    def refuse_changes(self, settled: Settled, data_module: dict[str, Any]) -> None:
        """Refuse to continue another run than this one. Raises UserError with every difference."""
        self.memory_plan = settled.memory_plan
        flags, tokenizer = (self.args, self.model_args, self.data_args), data_module["data_collator"].tokenizer
        dataset, digest = data_module["train_dataset"], tokenizer_digest(tokenizer)
        if data_module["eval_dataset"] and not self.args.packing:
            refuse_padded_rope(self.args, settled.config, data_module["eval_dataset"].lengths)
        self.identity = resume.run_identity(
            *flags, dataset, settled.config, engine(self.args), self.template.text, digest
        )
        if settled.attention.value:  # chosen by the machine, unless the user did
            self.identity["--attn_implementation"] = json.dumps(settled.attention.value)
        with all_ranks_or_none():
            if problems := differences_from_rank_0(self.identity):
                raise UserError(problems)
            if self.args.do_train and self.args.save_rehearsal and not self.model_args.use_lora:
                refuse_full_disk(self.args, settled.parameters, settled.arithmetic.steps, export_dtype(self.args))
        if self.resume:
            resume.refuse_changes(self.resume, self.before, self.identity, self.args.resume_with_changes)
        if self.args.do_train and rank() == 0:  # from here on the folder holds no finished model
            (Path(self.args.output_dir) / export.COMPLETE).unlink(missing_ok=True)

    def build_trainer(
        self,
        model: PreTrainedModel,
        head: LossHead | None,
        settled: Settled,
        tokenizer: PreTrainedTokenizerBase,
        data_module: dict[str, Any],
    ) -> SupervisedTrainer:
        """The run's Trainer, with its record, evaluation, stops, checkpoints and rehearsal. Benchmarks call it too."""
        args, report = self.args, self.report
        meter = Meter(ModelFlops.of(model), args.device, peak_tflops(args.device, compute_dtype(args)))
        callbacks: list[TrainerCallback] = []
        if data_module["eval_dataset"] is not None and args.eval_samples:
            generating = attention.stock_attention if args.packing else contextlib.nullcontext
            keep = report.record["samples"].append
            callbacks.append(AnswersCallback(data_module["eval_dataset"], args.eval_samples, keep, generating))
        if args.early_stopping_patience:
            callbacks.append(EarlyStop(args.early_stopping_patience))
        callbacks += [ReportCallback(report), meter, LossSpikes()]
        if args.packing:
            share = group_by_prefix if settled.prefixes.value else None
            data_module = data_module | {"data_collator": PackedCollator(share)}
        captured = None
        if settled.capture.value:
            rows = FilledRows(data_module["data_collator"], settled.arithmetic.examples_per_step)
            captured = CapturedSteps(rows)
        return SupervisedTrainer(
            model=model,
            args=args,
            processing_class=tokenizer,
            sampler=settled.sampler,
            head=head,
            captured=captured,
            meter=meter,
            write_checkpoint=self._write_checkpoint,
            before_first_step=partial(self._try_out, settled=settled),
            callbacks=callbacks,
            **data_module,
        )

    def _write_checkpoint(self, trainer: SupervisedTrainer, write) -> None:
        identity = self.identity
        if self.args.packing:
            identity = identity | {"tokens_per_micro_batch": str(trainer.sampler.max_tokens)}
        with self.report.phase("checkpoints"):
            checkpoint.save_whole(trainer, identity, write)

    def _try_out(self, trainer: SupervisedTrainer, settled: Settled) -> None:
        """Before the first step prove what the model computes, and rehearse its saving."""
        # a reloaded adapter draws its first weights: without this, another dropout
        with torch.random.fork_rng([self.args.device] if self.args.device.type == "cuda" else []):
            self._prove(trainer, settled)
            if self.args.save_rehearsal:
                began = time.perf_counter()
                with self.report.phase("rehearsal"):
                    what = rehearse(trainer, self.model_args, export_dtype(self.args), self.template)
                say(f"trial save: {what}, {time.perf_counter() - began:.1f} s")

    def _prove(self, trainer: SupervisedTrainer, settled: Settled) -> None:
        """Prove the whole model on rank 0. Raises NotPacked on all ranks where it can only be padded."""
        proofs, fault = list(settled.proofs), None
        with self.report.phase("plan"), all_ranks_or_none():
            if settled.whole_tried_on and rank() == 0:
                half = compute_dtype(self.args) != torch.float32
                smoothed = trainer.label_smoother and partial(trainer.label_smoother, shift_labels=True)
                how = trainer.head, trainer.data_collator.collator, settled.whole_tried_on, half
                together = self.args.per_device_train_batch_size > 1
                try:
                    proofs.append(proof.prove_whole(trainer.model, *how, together, smoothed))
                    fault = proofs[-1].fault
                except (UserError, torch.OutOfMemoryError):
                    raise
                except Exception as error:  # of a module that does not take such rows: the reason is printed
                    fault = in_words(error)
                if fault and not self.args.packing:
                    raise UserError(f"the model as it is in memory cannot be trained right: {fault}.")
        if fault := gather(fault)[0]:
            pad_instead(self.model_args, self.args, f"{fault}, with the whole model")
            set_accumulation(self.args, settled.arithmetic.accumulation)
            self.args.deepspeed_plugin = None  # a second Accelerator (1.15) takes the first one's by itself alone
            self.report.record.pop("packing", None)
            raise NotPacked
        say(proof.in_a_line(proofs))
        self.report.note("proof", tried=[one._asdict() for one in proofs])

    def training(self, trainer: SupervisedTrainer, settled: Settled) -> contextlib.ExitStack:
        """The phase in which the model is trained: what a checkpoint holds is loaded without running code."""
        datasets = {"train": trainer.train_dataset, "eval": trainer.eval_dataset}
        sections = settled.record() | {"throughput": trainer.meter.facts()}
        self.report.note_facts(trainer.model, trainer.processing_class, datasets, self.template.text, **sections)
        stack = contextlib.ExitStack()
        stack.enter_context(self.phase("train"))
        stack.callback(trainer.stops.restore)  # also where training ends in an error
        stack.enter_context(resume.loading(self.resume))
        stack.enter_context(safe_loads.safe_loads(self.resume, bool(self.args.deepspeed)))
        if settled.compilation.value:
            stack.enter_context(compiled_layers.more_graphs())
        return stack

    def evaluate(self, trainer: SupervisedTrainer) -> None:
        """Evaluate the model as it is, into the record."""
        # it computes in the run's type from now on
        trainer.accelerator.prepare_model(trainer.model, evaluation_mode=True)
        found = trainer.evaluate()
        self.report.note("final", eval_loss=found["eval_loss"], eval_perplexity=found["eval_perplexity"])
        self.report.complete = True

    def finish(self, trainer: SupervisedTrainer) -> None:
        """Export and prove the trained model, or say how to continue a run that was stopped; all ranks together."""
        self.report.enter("end")
        if not self.args.do_train:
            self.report.finish({})
        elif trainer.stops.ended_early(trainer.state):
            self.report.finish(trainer.meter.summary())
            self._say_how_to_continue(trainer.state.global_step, trainer.state.max_steps)
        else:
            exporter, proved = self._export(trainer)
            self.report.note("final", limits=exporter.limits)  # the card of a merge later has them too
            self.report.finish(trainer.meter.summary())
            if rank() == 0:
                try:
                    folder, record = Path(self.args.output_dir), self.report.record
                    write_card(folder, record, self.args.hub_model_id)
                    if self.model_args.merge_lora:
                        # in the place of peft's, which is blank
                        write_card(folder / "adapter", record)
                    export.complete(self.args.output_dir, trainer.state.global_step, proved, exporter.files)
                except OSError as error:
                    raise UserError(
                        f"{self.args.output_dir}: the model is saved and proved and can be used, but its card or {export.COMPLETE} could not be "
                        f"written ({error}). Make room there; a run that resumes from a checkpoint writes them anew."
                    ) from None
                export.upload(trainer)
        if self.lock:
            self.lock.release()
        # a rank that leaves while another still merges or writes aborts now and then (gloo's threads, torch 2.13)
        trainer.accelerator.wait_for_everyone()
        trainer.accelerator.end_training()
        say(self.report.phases())

    def _say_how_to_continue(self, step: int, steps: int) -> None:
        """Raises SystemExit 4 when the last steps could not be saved."""
        newest = next(iter(checkpoint.newest_first(self.args.output_dir)), None)
        if newest is not None and checkpoint.step_of(newest) == step:
            say(f"stopped at step {step:,} of {steps:,}. To continue:\n  {command_to_continue()}")
            if "TORCHELASTIC_RUN_ID" in os.environ:
                say(
                    "(torchrun, if it got the signal too, prints a traceback now and exits with code 1. The checkpoint is complete.)"
                )
            return
        there = f"{newest.name} is the newest checkpoint" if newest else "there is no checkpoint"
        if rank() == 0:
            complain(
                f"error: stopped at step {step:,} of {steps:,}, and checkpoint-{step} was not saved (see the warning above): {there}, so the "
                f"steps since then are lost. Make room in {self.args.output_dir}, then continue:\n  {command_to_continue()}"
            )
        raise SystemExit(4)

    def _where_it_stands(self) -> str:
        """What Ctrl-C leaves, as the end of a sentence."""
        newest = next(iter(checkpoint.newest_first(self.args.output_dir)), None)
        if newest is None or not self.identity:  # before that, checkpoints may be an earlier run's
            return ": no step was saved"
        return f": {newest.name} is the newest checkpoint. To continue: {command_to_continue()}"

    def _export(self, trainer: SupervisedTrainer) -> tuple[export.Exporter, list[str]]:
        """Write the tuned model for plain transformers and other programs; return what was proved."""
        folder, proved = Path(self.args.output_dir), []
        with self.phase("save"), checkpoint.exit_on_failed_save(folder / "model"):
            exporter = export.Exporter(trainer, self.model_args, export_dtype(self.args), self.template)
            exporter.save()
        # rank 0 alone reloads: split by ZeRO-3, the model would wait for the others for ever
        with self.report.phase("proof"), all_ranks_or_none(), loading.whole_models(self.args):
            if self.args.should_save:
                proved = exporter.prove()
        say(f"model saved in {folder}; proved: {'; '.join(proved)}")
        for limit in exporter.limits:
            say(f"warning: {limit}")
        return exporter, proved

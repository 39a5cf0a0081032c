"""Print a line at each log and each evaluation, and a progress bar in a terminal."""

import math
import sys
import time
from typing import Any

import transformers
from tqdm import tqdm

from sft.job import say
from sft.report.record import Report


class ReportCallback(transformers.TrainerCallback):
    """Print the live line, and fill and write the record. A terminal gets a progress bar below the lines."""

    def __init__(self, report: Report):
        self.report = report
        self.bar = tqdm(disable=True)
        self.first: tuple[float, int] | None = None  # when and at which step the first line was printed
        self.first_step_pending = True
        self.evaluated = 0.0  # when the last log was written, an evaluation's loss among others
        self.recorded = 0  # entries of the Trainer's log that are in the record

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step:  # resumed: the numbers are in the Trainer's state, the samples in the record alone
            self.report.keep_samples_until(state.global_step)
        hidden = args.disable_tqdm or not (state.is_world_process_zero and sys.stderr.isatty())
        steps = {"initial": state.global_step, "total": state.max_steps, "unit": "step"}
        self.bar = tqdm(**steps, dynamic_ncols=True, disable=hidden)
        self._record_numbers(state)
        self.report.write()

    def on_step_begin(self, args, state, control, **kwargs):
        if self.first_step_pending:
            self.report.enter("first_step")

    def on_step_end(self, args, state, control, **kwargs):
        if self.first_step_pending:
            self.report.enter("steps")
            self.first_step_pending = False
        self.bar.update(state.global_step - self.bar.n)
        if state.global_step >= state.max_steps and args.logging_strategy != "no":
            # else the last steps are not shown, and the final mean takes them from rank 0 alone (transformers 5.23)
            control.should_log = True

    def on_prediction_step(self, args, state, control, **kwargs):
        self.bar.set_postfix_str("evaluating")

    def on_log(self, args, state, control, logs=None, **kwargs):
        began = time.perf_counter()
        if "loss" in logs:
            left = self._seconds_left(began, state, logs)
            self._print(live_line(logs, state.global_step, state.max_steps, left, args.device.type))
        if "eval_loss" in logs:
            self._print(evaluation_line(logs, state))
            self.report.move_seconds("evaluate", logs["eval_runtime"])
        if "train_runtime" in logs:
            minutes = clock(logs["train_runtime"])
            self._print(f"trained to step {state.global_step} in {minutes}: mean loss {logs['train_loss']:.4f}")
            self.report.note("final", steps=state.global_step, train_loss=logs["train_loss"])
        if state.is_world_process_zero:
            self._record_numbers(state)
            self.report.write(spare=True)
        self.report.move_seconds("report", time.perf_counter() - began)
        self.evaluated = time.perf_counter()

    def on_evaluate(self, args, state, control, **kwargs):
        # the samples were answered meanwhile
        self.report.move_seconds("evaluate", time.perf_counter() - self.evaluated)
        self.bar.set_postfix_str("")

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()
        best = state.best_global_step if args.load_best_model_at_end else None
        if best is not None:
            self.report.note("final", best_step=best)
        for entry in [entry for entry in self.report.record["evaluations"] if best in (None, entry["step"])][-1:]:
            self.report.note("final", eval_loss=entry["eval_loss"], eval_perplexity=entry["eval_perplexity"])
        known = [entry for entry in self.report.record["evaluations"] if math.isfinite(entry["eval_loss"])]
        if len(known) > 1:
            lowest = min(known, key=lambda entry: entry["eval_loss"])
            self._print(
                f"lowest evaluation loss: {lowest['eval_loss']:.4f} at step {lowest['step']}; "
                f"the weights are those of step {best or state.global_step}"
            )
        self.report.complete = state.global_step >= state.max_steps

    def _record_numbers(self, state: transformers.TrainerState) -> None:
        """Take over what is new in the Trainer's log, which a resumed run starts with."""
        for entry in state.log_history[self.recorded :]:
            for section, number in (("log", "loss"), ("evaluations", "eval_loss")):
                if number in entry:
                    self.report.record[section].append(dict(entry))
        self.recorded = len(state.log_history)

    def _seconds_left(self, now: float, state: transformers.TrainerState, logs: dict[str, float]) -> float:
        when, step = self.first = self.first or (now, state.global_step)
        done = state.global_step - step  # with evaluations and saves at their share of the time
        return (state.max_steps - state.global_step) * ((now - when) / done if done else logs["step_time_s"])

    def _print(self, line: str) -> None:
        (say if self.bar.disable else self.bar.write)(line)


def live_line(logs: dict[str, float], step: int, steps: int, seconds_left: float, device_type: str) -> str:
    """step 40/300  loss 1.2345  lr 1.98e-05  grad 0.91  65,883 tok/s/GPU (31,204 trained)  padding 0.0%  MFU 41.3% ..."""
    grad = f"  grad {logs['grad_norm']:.2f}" if "grad_norm" in logs else ""
    mfu = f"  MFU {logs['mfu']:.1%}" if "mfu" in logs else "  MFU peak unknown" * (device_type == "cuda")
    where = "GPU" if device_type == "cuda" else "process"
    return (
        f"step {step:>{len(str(steps))}}/{steps}  loss {logs['loss']:.4f}  lr {logs['learning_rate']:.2e}{grad}  "
        f"{logs['tokens_per_s_per_gpu']:,.0f} tok/s/{where} ({logs['trained_tokens_per_s_per_gpu']:,.0f} trained)  "
        f"padding {logs['padding_share']:.1%}{mfu}  mem {logs['peak_memory_gib']:.2f} GiB  left {clock(seconds_left)}"
    )


def evaluation_line(logs: dict[str, float], state: transformers.TrainerState) -> str:
    """evaluation at step 40: loss 1.2345 (lowest so far), perplexity 3.44 over 12,345 trained tokens, 3.1 s"""
    losses = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
    best = " (lowest so far)" if logs["eval_loss"] <= min(losses) and len(losses) > 1 else ""
    return (
        f"evaluation at step {state.global_step}: loss {logs['eval_loss']:.4f}{best}, perplexity {logs['eval_perplexity']:.4g} "
        f"over {logs['eval_tokens']:,.0f} trained tokens, {logs['eval_runtime']:.1f} s"
    )


def clock(seconds: float) -> str:
    """59.4 -> 0:59; 3725 -> 1:02:05"""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def tracker_problems(flags: Any) -> list[str]:
    """Trackers of --report_to that cannot be used; transformers would say so after the model has loaded."""
    usable = [*transformers.integrations.get_available_reporting_integrations(), "all", "none"]
    return [
        f"--report_to {name}: no such tracker, or its package is not installed. Usable here: {', '.join(usable)}."
        for name in ([flags.report_to] if isinstance(flags.report_to, str) else flags.report_to or [])
        if name not in usable
    ]

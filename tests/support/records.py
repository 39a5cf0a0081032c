"""The fields that are documented, a record of a run that took no step, and a Trainer's state with some."""

import re

import transformers

import utils
from sft.report import __main__
from sft.report.record import Report

FIELDS = re.findall(r"^\| `(\S+)` \|", __main__.FIELDS_PAGE.read_text(encoding="utf-8"), re.M)


def unstarted(folder):
    """A report before anything is known, as resume and cost see it."""
    args = transformers.TrainingArguments(output_dir=str(folder), use_cpu=True, report_to="none")
    return Report(utils.ModelArguments(), utils.DataArguments(), args), args


def state_with(entries):
    log = [
        {"step": step, "epoch": step / 10, "loss": 2.0, "learning_rate": 1e-5, "grad_norm": 1.0, "step_time_s": 0.1}
        | {
            "tokens_per_s_per_gpu": 1e4,
            "trained_tokens_per_s_per_gpu": 5e3,
            "padding_share": 0.0,
            "peak_memory_gib": 1.0,
        }
        for step in range(1, entries + 1)
    ]
    state = transformers.TrainerState(log_history=log, max_steps=10**6, global_step=entries)
    state.is_world_process_zero = True
    return state

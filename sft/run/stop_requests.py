"""Stop early on a signal: finish the step, save, and print how to continue.

    SIGTERM, SIGINT, SIGHUP, SIGUSR1    finish the optimizer step, save a whole checkpoint on all ranks, exit 0
    a second one                        stop at once

torchrun passes SIGTERM and SIGINT on to its processes and kills them 30 s later. A large checkpoint needs more time, and a
scheduler may send SIGUSR1: `torchrun --signals-to-handle SIGTERM,SIGINT,SIGUSR1 --shutdown-timeout 600` (torch 2.13).
"""

import os
import shlex
import signal
import sys
import time

from transformers import TrainerCallback

from sft.job import rank
from sft.outside import is_secret, without_password

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
ONE_PRESS_S = 2.0  # a scheduler and torchrun may both pass on the same request; later ones are a second request


class StopRequests(TrainerCallback):
    """Signals to this process, and what all ranks agreed on."""

    def __init__(self):
        self.requested: signal.Signals | None = None  # this process got a signal
        self.agreed = False  # some rank was asked to stop, and all know it, in the same step
        self._requested_at = 0.0
        self._before: dict = {}

    def on_train_begin(self, args, state, control, **kwargs):
        heeded = [number for number in SIGNALS if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._on_signal) for number in heeded}  # nohup ignores SIGHUP

    def on_train_end(self, args, state, control, **kwargs):
        self.restore()

    def restore(self) -> None:
        """Leave signals to whoever had them: no step will be finished any more."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _on_signal(self, number, frame):
        if self.requested is None:
            self.requested, self._requested_at = signal.Signals(number), time.monotonic()
            line = f"\n{self.requested.name}: finishing this step and saving a checkpoint. A second signal stops at once.\n"
            if rank() == 0:
                os.write(2, line.encode())  # print is not safe inside a handler
        elif time.monotonic() - self._requested_at > ONE_PRESS_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def on_step_end(self, args, state, control, **kwargs):
        if self.agreed:
            control.should_save, control.should_evaluate, control.should_training_stop = True, False, True

    def ended_early(self, state) -> bool:
        """Whether a signal ended the run before its last step."""
        return self.agreed and state.global_step < state.max_steps


def ignore_in_worker(_worker_id: int) -> None:
    """A DataLoader's worker_init_fn: a signal to the whole process group must not end the workers before the step is done."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def command_to_continue(argv: list[str] | None = None) -> str:
    """The command that was given, with `--resume_from_checkpoint True`; secrets are left out of it."""
    script, *flags = sys.argv if argv is None else argv
    words, skipping = [], False
    for word in flags:
        if word.startswith("--"):
            name = word.split("=")[0].lstrip("-").replace("-", "_")
            skipping = name == "resume_from_checkpoint"
            if skipping:
                continue
            if is_secret(name):
                words.append(f"--{name}=***")
                skipping = True
                continue
        elif skipping:
            continue
        words.append(without_password(word))
    launcher = "python"
    if "TORCHELASTIC_RUN_ID" in os.environ:
        launcher = f"torchrun --nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}"
        if os.environ["GROUP_WORLD_SIZE"] != "1":
            launcher += f" --nnodes={os.environ['GROUP_WORLD_SIZE']} [your rendezvous flags]"
    return f"{launcher} {shlex.join([script, *words, '--resume_from_checkpoint', 'True'])}"

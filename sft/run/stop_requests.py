"""Why a run stops before its end, and what is safe by then: a signal, a number that is not finite; and a notice of loss spikes.

    SIGTERM, SIGINT, SIGUSR1    finish the optimizer step, save a whole checkpoint on all ranks, exit 0
    a second one                stop at once
    NaN or infinity             stop before the weights are touched, naming step, rank and CSV rows

torchrun passes SIGTERM and SIGINT on to its processes and kills them 30 s later. A large checkpoint needs more time, and a
scheduler may send SIGUSR1: `torchrun --signals-to-handle SIGTERM,SIGINT,SIGUSR1 --shutdown-timeout 600` (torch 2.13).
"""

import os
import shlex
import signal
import statistics
import sys
import time
from collections import deque
from itertools import pairwise
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback

from sft.job import UserError, rank, say, world_size

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)


ONE_PRESS_S = 2.0  # a scheduler and torchrun may both pass on the same request; later ones are a second request


SPIKE_MEMORY = 50  # logged losses that a new one is compared with


PREFIXES = ("prefix_starts", "prefix_lengths")  # keys of a packed micro-batch: see sft/step/micro_batches.py


class Stops(TrainerCallback):
    """Watches one run. The Trainer tells it of each micro-batch and, before each update, of the gradient norm."""

    def __init__(self):
        self.asked: signal.Signals | None = None  # this process got a signal
        self.asked_at = 0.0
        self.stopping = False  # all ranks agreed on it, in the same step
        self.micro_batches: list[tuple[dict, torch.Tensor]] = []  # of this step: inputs, loss on its device
        self.losses: deque[float] = deque(maxlen=SPIKE_MEMORY)
        self.loss_since_log = 0.0  # summed over steps, the mean over ranks
        self._before: dict = {}
        self.counts: torch.Tensor  # (ranks, counts), what each rank gave `ask` in this step
        self._numbers: torch.Tensor  # (ranks, numbers), on their way to the host
        self._sent: torch.cuda.Event

    # ---- signals

    def on_train_begin(self, args, state, control, **kwargs):
        self._before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}

    def on_train_end(self, args, state, control, **kwargs):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _on_signal(self, number, frame):
        if self.asked is None:
            self.asked, self.asked_at = signal.Signals(number), time.monotonic()
            line = f"\n{self.asked.name}: finishing this step and saving a checkpoint. A second signal stops at once.\n"
            if rank() == 0:
                os.write(2, line.encode())  # print is not safe inside a handler
        elif time.monotonic() - self.asked_at > ONE_PRESS_S:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def on_step_end(self, args, state, control, **kwargs):
        self.micro_batches.clear()
        if self.stopping:
            control.should_save, control.should_evaluate, control.should_training_stop = True, False, True

    def stopped_early(self, state) -> bool:
        """Whether a signal ended the run before its last step."""
        return self.stopping and state.global_step < state.max_steps

    def farewell(self, state) -> str:
        """What a stopped run says last."""
        return f"stopped at step {state.global_step:,} of {state.max_steps:,}. To continue:\n  {command_to_continue()}"

    # ---- numbers that are not finite

    def saw(self, inputs: dict, loss: torch.Tensor) -> None:
        """Remember a micro-batch of this step; its loss stays on the device, so that nothing waits for it."""
        self.micro_batches.append((inputs, loss.detach()))

    def ask(self, trainer, grad_norm: torch.Tensor | float | None, counts: list[float]) -> None:
        """Send stop requests, this step's loss and gradient norm, and counts to all ranks and to the host; nothing waits.

        The gradient norm that the Trainer computed anyway is the same on all ranks; the others are each rank's own.
        """
        device = trainer.args.device
        norm = grad_norm.full_tensor() if isinstance(grad_norm, DTensor) else grad_norm
        norm = torch.as_tensor(float("nan") if norm is None else norm, dtype=torch.float32, device=device)
        loss = torch.stack([loss for _, loss in self.micro_batches]).sum().float()
        broken = ~torch.isfinite(loss)
        # With float16 an infinite gradient is how the loss scale is found; the scaler skips that update itself.
        if grad_norm is not None and not trainer.args.fp16:
            broken |= ~torch.isfinite(norm)
        if trainer.is_deepspeed_enabled and not trainer.args.fp16:  # ZeRO 3 leaves the last step's norm in place
            broken |= bool(getattr(trainer.deepspeed.optimizer, "overflow", False))
        known = torch.tensor([self.asked is not None, *counts], dtype=torch.float64).to(device, non_blocking=True)
        numbers = torch.cat([torch.stack([broken.double(), loss.double(), norm.double()]), known])
        every = trainer.accelerator.gather(numbers[None])  # (ranks, numbers)
        self._numbers = every.to("cpu", non_blocking=True)
        if device.type == "cuda":
            self._sent = torch.cuda.Event()
            self._sent.record()

    def before_update(self, trainer, grad_norm: torch.Tensor | float | None) -> float | None:
        """Wait for what `ask` sent, and know whether to stop and what to log. Returns the gradient norm.

        Raises:
            UserError: on all ranks, before the weights are touched, where a number is not finite.
        """
        if trainer.args.device.type == "cuda":
            self._sent.synchronize()
        broken, losses, norms, asked = self._numbers[:, :4].T
        self.counts = self._numbers[:, 4:]
        self.stopping = bool(asked.any())
        self.loss_since_log += float(losses.mean())
        norm = float(norms[0])
        if broken.any():
            message = self._describe(trainer, norm)
            step = trainer.state.global_step
            if step and not (Path(trainer.args.output_dir) / f"checkpoint-{step}").is_dir():
                trainer._save_checkpoint(trainer.model_wrapped, None)
            raise UserError(message)
        return None if grad_norm is None else norm

    def _describe(self, trainer, grad_norm: float) -> str:
        """What is not finite, in which step, and the rows of the micro-batches that it came from."""
        mine = [
            (rank(), number, loss.item(), rows_of(inputs, trainer.train_dataset))
            for number, (inputs, loss) in enumerate(self.micro_batches, start=1)
        ]
        found: list[list[tuple]] = [mine]
        if dist.is_initialized():
            found = [[]] * world_size()
            dist.all_gather_object(found, mine)
        every = [entry for entries in found for entry in entries]
        guilty = [entry for entry in every if not torch.isfinite(torch.tensor(entry[2]))]
        step = trainer.state.global_step
        saved = f"They are in checkpoint-{step}" if step else "No step was taken yet"
        if guilty:
            what = f"the loss is {guilty[0][2]}"
        else:
            what = f"every loss is finite but the gradient norm is {grad_norm}; any of these micro-batches can be the cause"
        where = "\n".join(
            f"  rank {r}, micro-batch {n}: CSV rows {', '.join(map(str, rows))}" for r, n, _, rows in guilty or every
        )
        return (
            f"step {step + 1}: {what}\n{where}\n"
            f"The update was not applied: the weights are those of step {step}. {saved}.\n"
            "What to try: read these rows; --bf16 True in place of --fp16; a lower --learning_rate or a longer --warmup_steps, in a new "
            f"run that begins with these weights (--model_name_or_path {trainer.args.output_dir}/checkpoint-{step}) or from the start."
        )

    # ---- spikes

    def on_log(self, args, state, control, logs=None, **kwargs):
        loss = (logs or {}).get("loss")
        if loss is None:
            return
        if is_spike(loss, self.losses):
            say(
                f"notice: step {state.global_step}: the loss is {loss:.4f}; the {len(self.losses)} before it had a median of {statistics.median(self.losses):.4f}"
            )
        self.losses.append(loss)


def is_spike(loss: float, before: deque[float] | list[float]) -> bool:
    """Whether a loss leaves the band of the ones before it: median + 6 times the median distance from it, and 20 % above.

    The median and not the mean, so that one spike does not widen the band for the next.
    """
    if len(before) < 10:
        return False
    middle = statistics.median(before)
    distance = statistics.median(abs(other - middle) for other in before)
    return loss > middle + 6 * distance and loss > 1.2 * middle


def rows_of(inputs: dict, dataset) -> list[int]:
    """CSV rows (the header is row 1) of a micro-batch, found by its tokens (all rows with them, if several are equal).

    Args:
        inputs: a micro-batch of `PackedCollator`, or a padded one (`attention_mask`).
        dataset: with `lengths`, `row_numbers` and `[i]["input_ids"]`.
    """
    ids = inputs["input_ids"].cpu()
    if inputs.get("attention_mask") is not None:
        examples = [row[mask.bool()] for row, mask in zip(ids, inputs["attention_mask"].cpu())]
    else:
        edges = inputs["cu_seq_lens_q"].tolist()
        parts = ids.flatten().split([end - start for start, end in pairwise(edges)])
        starts, shared = (inputs[name].tolist() if name in inputs else [0] * len(parts) for name in PREFIXES)
        examples = [torch.cat([ids[0, a : a + n], part]) for a, n, part in zip(starts, shared, parts)]
    return sorted(
        {
            int(dataset.row_numbers[index])
            for example in examples
            for index in (dataset.lengths == len(example)).nonzero()[0].tolist()
            if torch.equal(dataset[index]["input_ids"], example)
        }
    )


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
            if name.endswith(("_token", "_key", "password", "secret")):
                words.append(f"--{name}=***")
                skipping = True
                continue
        elif skipping:
            continue
        words.append(word)
    launcher = "python"
    if "TORCHELASTIC_RUN_ID" in os.environ:
        launcher = f"torchrun --nproc_per_node={os.environ['LOCAL_WORLD_SIZE']}"
        if os.environ["GROUP_WORLD_SIZE"] != "1":
            launcher += f" --nnodes={os.environ['GROUP_WORLD_SIZE']} [your rendezvous flags]"
    return f"{launcher} {shlex.join([script, *words, '--resume_from_checkpoint', 'True'])}"

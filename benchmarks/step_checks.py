"""What bench_step.py checks before it measures: gradients against float32 ones, and the automatic budget on a fuller card."""

import gc
import subprocess
import sys

import numpy as np
import torch
import transformers
from step_variants import SHAPES, Clock, RandomRows, Scenario, our_trainer


def check_gradients(lengths: np.ndarray, device: torch.device) -> list[str]:
    """The gradients of one optimizer step, through the Trainer: packed in bf16 against padded in float32, ||a - b|| / ||b||.

    Raises ArithmeticError where packed is worse than padded bf16 by more than a quarter, where anything is not a number, or
    where a batch whose examples see each other passes too.
    """
    said = []
    packed = {
        "packed": ["--compile_layers", "False"],
        "packed, small micro-batches": ["--compile_layers", "False", "--tokens_per_micro_batch", "1024"],
        "packed, compiled": ["--compile_layers", "True"],
        "examples see each other": ["--compile_layers", "False"],
    }
    for shape in ("check", "check, heads of 100") if device.type == "cuda" else ("tiny",):
        scenario = Scenario(shape, 4, 4, 1024, (), (0, 1), (0, 1))
        rows = RandomRows(lengths, scenario.max_length, SHAPES[shape].get("vocab_size", 32000))
        reference = gradients_of(scenario, rows, device, ["--packing", "False", "--bf16", "False"])
        padded = relative_error(
            gradients_of(scenario, rows, device, ["--packing", "False", "--bf16", "True"]), reference
        )
        said.append(f"gradients, {shape}: padded bf16 against padded float32: {padded:.2e}")
        for way, flags in packed.items():
            leak = way == "examples see each other"
            found = gradients_of(scenario, rows, device, ["--bf16", "True", *flags], leak)
            error = relative_error(found, reference)
            said.append(f"gradients, {shape}: {way}, bf16 against padded float32: {error:.2e}")
            good = error > 5 * padded if leak else error <= 1.25 * padded  # NaN is neither
            if not good:
                raise ArithmeticError("\n".join(said))
    return said


# Holds all of the card but so many bytes until its input ends.
HOLD = """
import sys, torch
torch.empty(0, device="cuda")
taken = torch.empty(torch.cuda.mem_get_info()[0] - int(sys.argv[1]), dtype=torch.uint8, device="cuda")
print("held", flush=True)
sys.stdin.read()
"""


def check_budget(lengths: np.ndarray, free_gib: float) -> list[str]:
    """On a card with this much memory left, --tokens_per_micro_batch auto runs where padded runs.

    Another process takes the rest: what this one's allocator holds would count as room. Raises torch.OutOfMemoryError where it does not.
    """
    device, said = torch.device("cuda"), []
    scenario = Scenario("1.1B", 2, 16, 1024, (), (0, 2), (0, 2))
    rows = RandomRows(lengths, scenario.max_length, 32000)
    torch.zeros(1, device=device)  # opens the GPU, which takes memory of its own, before the rest is counted
    command = [sys.executable, "-c", HOLD, str(int(free_gib * 2**30))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        if holder.stdout.readline() != "held\n":
            raise RuntimeError(f"no process could take the card's memory but {free_gib} GiB")
        for way, flags in {"padded": ["--packing", "False"], "packed": ["--compile_layers", "False"]}.items():
            trainer, settled = our_trainer(scenario, rows, device, flags)
            Clock(0, 2, device).watch(trainer)
            torch.cuda.reset_peak_memory_stats()
            trainer.train()
            peak = torch.cuda.max_memory_allocated() / 2**30
            said.append(f"{free_gib:.0f} GiB free, {way}: peak {peak:.1f} GiB")
            if settled.packing:
                said[-1] += f"; {settled.packing}"
            del trainer
            gc.collect()
            torch.cuda.empty_cache()
    return said


def gradients_of(scenario, rows, device, flags: list[str], leak: bool = False) -> dict[str, torch.Tensor]:
    """Every parameter's gradient just before the first optimizer step."""
    found: dict[str, torch.Tensor] = {}

    class Catch(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
            found.update({name: weight.grad.float().clone() for name, weight in model.named_parameters()})
            control.should_training_stop = True

    trainer, _ = our_trainer(scenario, rows, device, ["--max_grad_norm", "0", *flags])
    trainer.add_callback(Catch())
    if leak:
        trainer.model.register_forward_pre_hook(leaking, with_kwargs=True)
    trainer.train()
    del trainer
    gc.collect()
    return found


def leaking(module: torch.nn.Module, args: tuple, inputs: dict) -> tuple[tuple, dict]:
    """Let the examples of a packed row see each other."""
    tokens = inputs["input_ids"].numel()
    whole = torch.tensor([0, tokens], dtype=torch.int32, device=inputs["input_ids"].device)
    edges = {"cu_seq_lens_q": whole, "cu_seq_lens_k": whole, "max_length_q": tokens, "max_length_k": tokens}
    return args, inputs | edges


def relative_error(found: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> float:
    """||a - b|| / ||b|| over all parameters together."""
    assert found.keys() == reference.keys()
    difference = sum((found[name] - reference[name]).double().square().sum() for name in reference)
    size = sum(reference[name].double().square().sum() for name in reference)
    return float((difference / size) ** 0.5)

"""Tokens per second, model FLOPs, MFU, padding and memory of a run, counted without asking the GPU anything."""

import re
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
import transformers

from sft.step.counts import TokenCounts

# Dense 16-bit tensor-core peaks with float32 accumulation, TFLOP/s: NVIDIA's and AMD's data sheets (the printed figure
# halved where the sheet gives the 2:4-sparse rate). The first name found in the device's name counts.
PEAK_TFLOPS = {
    "B200": 2250,
    "GH200": 989,
    "H200 NVL": 835,
    "H200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "H800": 989,
    "H20": 148,
    "A100": 312,
    "A800": 312,
    "A40": 150,
    "A30": 165,
    "A10G": 70,
    "A10": 125,
    "L40S": 362,
    "L40": 181,
    "L4": 121,
    "RTX 6000 Ada": 364,
    "RTX A6000": 155,
    "RTX 5090": 210,
    "RTX 4090": 165,
    "RTX 4080": 97,
    "RTX 3090": 71,
    "V100": 125,
    "T4": 65,
    "MI300X": 1307,
    "MI325X": 1307,
}


# Cut-down or partitioned devices carry the full device's name and reach less.
OTHER_DEVICES = re.compile(r"MIG|Laptop|Max-Q|SUPER|RTX 4090 D")


def peak_tflops(device_name: str, compute_dtype: torch.dtype) -> float | None:
    """The device's dense 16-bit peak in TFLOP/s; None for an unknown device, or for a run that computes in float32."""
    if compute_dtype not in (torch.bfloat16, torch.float16) or OTHER_DEVICES.search(device_name):
        return None
    return next((peak for name, peak in PEAK_TFLOPS.items() if re.search(rf"\b{name}\b", device_name)), None)


@dataclass(frozen=True)
class ModelFlops:
    """Floating-point operations that a training step must do, by the model's shape.

    A weight costs 2 in the forward pass for each token and 4 in the backward pass (2 where the weight is frozen: only
    the gradient of its input is needed). Attention costs 12 x layers x heads x head_dim x sum of len^2, scores and
    values, forward and backward; a causal model needs half of it. Recomputed activations are not counted (MFU, not HFU).

    Two conventions. `step` counts what the recipe needs: the causal half, and the output head only on the positions
    that are trained, since nobody asks for the others. `step_6n` is the usual formula of PaLM and its followers: 6 for
    each weight (the input embedding left out, the head counted for every token) and the whole of len^2. It gives the
    higher number, and the one to compare with other programs. Neither counts a shared prefix more than once.
    """

    layer_weights: int  # elements of the matrices in the layers (and of LoRA's, where there are any)
    trained_layer_weights: int  # those of them that are trained
    head_weights: int  # elements of the output head
    trained_head_weights: int
    attention_width: int  # layers x heads x head_dim

    @classmethod
    def of(cls, model: Any) -> "ModelFlops":
        """Count from the shapes of the linear layers: right for sharded (ZeRO-3), quantized and LoRA weights as well."""
        head = model.get_output_embeddings()
        weights = dict.fromkeys(("layer", "trained_layer", "head", "trained_head"), 0)
        for name, module in model.named_modules():
            # peft keeps the untrained copy of a fully trained module beside it, and wraps a layer under `base_layer`
            if not isinstance(module, torch.nn.Linear) or ".original_module" in name:
                continue
            size = module.in_features * module.out_features
            kind = "head" if module is head or name.split(".base_layer")[0].endswith("lm_head") else "layer"
            weights[kind] += size
            weights[f"trained_{kind}"] += size if module.weight.requires_grad else 0
        config = model.config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            layer_weights=weights["layer"],
            trained_layer_weights=weights["trained_layer"],
            head_weights=weights["head"],
            trained_head_weights=weights["trained_head"],
            attention_width=config.num_hidden_layers * config.num_attention_heads * head_dim,
        )

    def step(self, counts: TokenCounts) -> int:
        """FLOPs that these examples need: causal attention, head on trained positions. What `mfu` is made of."""
        layers = (4 * self.layer_weights + 2 * self.trained_layer_weights) * (counts.real - counts.shared)
        head = (4 * self.head_weights + 2 * self.trained_head_weights) * counts.trained
        return layers + head + 6 * self.attention_width * counts.squared

    def step_6n(self, counts: TokenCounts) -> int:
        """FLOPs by the usual formula, 6 N tokens + 12 layers heads head_dim len^2. What `mfu_6n` is made of."""
        weights = self.layer_weights + self.head_weights
        trained = self.trained_layer_weights + self.trained_head_weights
        return (4 * weights + 2 * trained) * (counts.real - counts.shared) + 12 * self.attention_width * counts.squared


MFU_CONVENTION = (
    "6 FLOPs per weight and real token (4 where frozen; shared prefixes once), input embedding left out, head on trained tokens only, "
    "+ 6 x layers x heads x head_dim x sum of len^2 (causal half)"
)


def peak_memory_gib(device: torch.device) -> float:
    """Highest memory of this process so far, GiB: the CUDA allocator's on a GPU, the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # ru_maxrss is in KiB on Linux and in bytes on macOS (getrusage(2) of each)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


class Meter(transformers.TrainerCallback):
    """A stopwatch over training steps, and the tokens that went by.

    It runs only while steps run: `pause()` before an evaluation or a save, `resume()` after it. As the Trainer's last
    callback it does so by itself. `read()` gives the numbers since the last reading, of the whole job: every rank must
    call it. Names and units are in `sft/report/record.py`'s table of fields.

    Args:
        flops: the model's, before it is wrapped.
        device: this rank's.
        device_name, compute_dtype: decide the peak that MFU refers to.
        gather: (numbers,) -> (ranks, numbers), every rank's; default for a run of one process.
    """

    convention = MFU_CONVENTION

    def __init__(
        self,
        flops: ModelFlops,
        device: torch.device,
        device_name: str,
        compute_dtype: torch.dtype,
        gather: Callable[[torch.Tensor], torch.Tensor] = lambda numbers: numbers[None],
    ):
        self.flops = flops
        self.device = device
        self.peak_tflops = peak_tflops(device_name, compute_dtype)
        self.gather = gather
        self.counts = TokenCounts()
        self.steps = 0
        self.total = TokenCounts()  # of the job, whole run
        self.total_seconds = 0.0
        self.total_flops = 0
        self.total_flops_6n = 0
        self.peak_memory_gib = 0.0
        self._seconds = 0.0
        self._since: float | None = None
        self._ranks = 1

    def add_step(self, counts: TokenCounts) -> None:
        """Count one optimizer step's micro-batches of this rank. The clock starts with the first step."""
        if self._since is None:
            self.resume()
        self.counts += counts
        self.steps += 1

    def pause(self) -> None:
        """Stop the clock when the device has finished what it was given."""
        if self._since is not None:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            self._seconds += time.perf_counter() - self._since
            self._since = None

    def resume(self) -> None:
        """Start the clock."""
        self._since = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_evaluate or control.should_save:
            self.pause()

    def on_epoch_end(self, args, state, control, **kwargs):
        if control.should_evaluate or control.should_save:
            self.pause()

    def on_evaluate(self, args, state, control, **kwargs):
        self.resume()

    def on_save(self, args, state, control, **kwargs):
        self.resume()

    def own(self) -> list[float]:
        """This rank's counts since the last reading, and its peak memory in GiB: what `gather` gives of every rank."""
        counts = self.counts
        return [*asdict(counts).values(), peak_memory_gib(self.device)]

    def read(self) -> dict[str, float]:
        """The rates since the last reading. Call it at one and the same point of each step: where the host has its gradient norm."""
        now = time.perf_counter()
        running = self._since is not None
        seconds = self._seconds + (now - self._since if self._since is not None else 0.0)
        self._seconds, self._since = 0.0, now if running else None
        own, steps = torch.tensor(self.own(), dtype=torch.float64), self.steps
        self.counts, self.steps = TokenCounts(), 0
        every = self.gather(own)
        ranks = len(every)
        job = TokenCounts(*(int(total) for total in every[:, :-1].sum(dim=0)))
        # `every` was asked for before this step's update; the first update is when the optimizer takes its memory
        self.peak_memory_gib = max(float(every[:, -1].max()), float(own[-1]))
        flops, flops_6n = self.flops.step(job), self.flops.step_6n(job)
        self._ranks = ranks
        self.total += job
        self.total_seconds += seconds
        self.total_flops += flops
        self.total_flops_6n += flops_6n
        return {"step_time_s": seconds / max(steps, 1), **self._rates(job, seconds, flops, flops_6n)}

    def summary(self) -> dict[str, float]:
        """The same rates over all readings of this process, and the sums."""
        return {
            "train_steps_s": self.total_seconds,
            "tokens": self.total.real,
            "trained_tokens": self.total.trained,
            "model_flops": self.total_flops,
            **self._rates(self.total, self.total_seconds, self.total_flops, self.total_flops_6n),
        }

    def _rates(self, counts: TokenCounts, seconds: float, flops: int, flops_6n: int) -> dict[str, float]:
        per_gpu = 1 / (max(seconds, 1e-9) * self._ranks)
        rates = {
            "tokens_per_s_per_gpu": counts.real * per_gpu,
            "trained_tokens_per_s_per_gpu": counts.trained * per_gpu,
            "padding_share": counts.padding_share(),
            "shared_share": counts.shared / counts.real if counts.real else 0.0,
            "tflops_per_gpu": flops * per_gpu / 1e12,
            "peak_memory_gib": self.peak_memory_gib,
        }
        if self.peak_tflops is not None:
            rates["mfu"] = rates["tflops_per_gpu"] / self.peak_tflops
            rates["mfu_6n"] = flops_6n * per_gpu / 1e12 / self.peak_tflops
        return rates


def device_name(device: torch.device) -> str:
    """The accelerator's name as its driver gives it; "cpu" on a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type

"""Count tokens per second, model FLOPs, MFU, padding and memory of a run, without waiting for the GPU."""

import re
import resource
import sys
import time
from dataclasses import astuple, dataclass
from typing import Any

import torch
import transformers

from sft.step.counts import TokenCounts

# Dense 16-bit tensor-core peaks with float32 accumulation, TFLOP/s: NVIDIA's and AMD's data sheets (the printed figure
# halved where the sheet gives the 2:4-sparse rate). The longest name found in the device's name counts.
PEAK_TFLOPS = {
    2250: ("B200",),
    1307: ("MI300X", "MI325X"),
    989: ("GH200", "H200", "H100", "H800"),
    835: ("H200 NVL", "H100 NVL"),
    756: ("H100 PCIe",),
    364: ("RTX 6000 Ada",),
    362: ("L40S",),
    312: ("A100", "A800"),
    210: ("RTX 5090",),
    181: ("L40",),
    165: ("A30", "RTX 4090"),
    155: ("RTX A6000",),
    150: ("A40",),
    148: ("H20",),
    125: ("A10", "V100"),
    121: ("L4",),
    97: ("RTX 4080",),
    71: ("RTX 3090",),
    70: ("A10G",),
    65: ("T4",),
}
# Cut-down or partitioned devices carry the full device's name and reach less.
OTHER_DEVICES = re.compile(r"MIG|Laptop|Max-Q|SUPER|RTX 4090 D")


def peak_tflops(device_name: str, compute_dtype: torch.dtype) -> float | None:
    """The device's dense 16-bit peak in TFLOP/s; None for an unknown device, or for a run that computes in float32."""
    if compute_dtype not in (torch.bfloat16, torch.float16) or OTHER_DEVICES.search(device_name):
        return None
    names = {name: peak for peak, names in PEAK_TFLOPS.items() for name in names}
    found = [name for name in names if re.search(rf"\b{name}\b", device_name)]
    return names[max(found, key=len)] if found else None


@dataclass(frozen=True)
class ModelFlops:
    """Floating-point operations that a training step must do, by the model's shape.

    A weight costs 2 in the forward pass for each token and 4 in the backward pass (2 if the weight is frozen: only the
    gradient of its input is needed). Attention costs 12 x layers x heads x head_dim x sum of len^2, scores and values,
    forward and backward; a causal model needs half of it. Recomputed activations are not counted (MFU, not HFU).

    Two conventions. `step` counts what the recipe needs: the causal half, and the output head only on the positions
    that are trained. `step_6n` is the usual formula of PaLM and its followers: 6 for each weight (without the input
    embedding, with the head for every token) and the whole of len^2. It gives the higher number, and the one to compare
    with other programs. Neither counts a shared prefix more than once.
    """

    layer_weights: int  # elements of the matrices in the layers, LoRA's included
    trained_layer_weights: int
    head_weights: int  # elements of the output head
    trained_head_weights: int
    attention_width: int  # layers x heads x head_dim

    @classmethod
    def of(cls, model: Any) -> "ModelFlops":
        """Count from the shapes of the linear layers: right for sharded (ZeRO-3), quantized and LoRA weights as well."""
        config, head = model.config, model.get_output_embeddings()
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        sizes = {"attention_width": config.num_hidden_layers * config.num_attention_heads * head_dim}
        sizes |= dict.fromkeys(("layer_weights", "trained_layer_weights", "head_weights", "trained_head_weights"), 0)
        for name, module in model.named_modules():
            # peft keeps the untrained copy of a fully trained module next to it, and wraps a layer under `base_layer`
            if not isinstance(module, torch.nn.Linear) or ".original_module" in name:
                continue
            size = module.in_features * module.out_features
            kind = "head" if module is head or name.split(".base_layer")[0].endswith("lm_head") else "layer"
            sizes[f"{kind}_weights"] += size
            sizes[f"trained_{kind}_weights"] += size if module.weight.requires_grad else 0
        return cls(**sizes)

    def step(self, counts: TokenCounts) -> int:
        """FLOPs that these examples need: causal attention, head on trained positions. `mfu` is made of them."""
        layers = (4 * self.layer_weights + 2 * self.trained_layer_weights) * (counts.real - counts.shared)
        head = (4 * self.head_weights + 2 * self.trained_head_weights) * counts.trained
        return layers + head + 6 * self.attention_width * counts.squared

    def step_6n(self, counts: TokenCounts) -> int:
        """FLOPs by the usual formula, 6 N tokens + 12 layers heads head_dim len^2. `mfu_6n` is made of them."""
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
    """A stopwatch over training steps, and a count of their tokens.

    It runs only while steps run: `pause()` before an evaluation or a save, `resume()` after it. As the Trainer's last
    callback it does so by itself. docs/run_report.md has the names and units of its numbers.

    Args:
        flops: the model's, before it is wrapped.
        device: this rank's.
        device_name, compute_dtype: decide the peak that MFU refers to.
    """

    def __init__(self, flops: ModelFlops, device: torch.device, device_name: str, compute_dtype: torch.dtype):
        self.flops, self.device = flops, device
        self.peak_tflops = peak_tflops(device_name, compute_dtype)
        self.counts, self.steps = TokenCounts(), 0  # of this rank, since the last reading
        self.total, self.total_seconds = TokenCounts(), 0.0  # of the job, in this process's life
        self.peak_memory_gib = 0.0
        self._seconds = 0.0
        self._since: float | None = None
        self._ranks = 1

    def facts(self) -> dict[str, Any]:
        """What MFU means here: the record's section `throughput`."""
        peak = {} if self.peak_tflops is None else {"peak_tflops": self.peak_tflops}
        return {"mfu_convention": MFU_CONVENTION, **peak}

    def add_step(self, counts: TokenCounts) -> int:
        """Count one optimizer step's micro-batches of this rank; the first step starts the clock. Returns its FLOPs."""
        if self._since is None:
            self.resume()
        self.counts += counts
        self.steps += 1
        return self.flops.step(counts)

    def pause(self) -> None:
        """Stop the clock when the device has finished its work."""
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

    on_epoch_end = on_step_end

    def on_evaluate(self, args, state, control, **kwargs):
        self.resume()

    on_save = on_evaluate

    def own(self) -> list[float]:
        """This rank's counts since the last reading and its peak memory in GiB, to be gathered for `read`."""
        return [*astuple(self.counts), peak_memory_gib(self.device)]

    def read(self, every: torch.Tensor) -> dict[str, float]:
        """The job's rates since the last reading. Call it at one point of each step: once the host has the gradient norm.

        Args:
            every: (ranks, numbers), what `own` gave on each rank in this step.
        """
        now = time.perf_counter()
        seconds = self._seconds + (now - self._since if self._since is not None else 0.0)
        self._seconds, self._since = 0.0, None if self._since is None else now
        job = TokenCounts(*(int(total) for total in every[:, :-1].sum(dim=0)))
        self._ranks = len(every)
        # `every` is from before this step's update; the optimizer takes its memory in the first update
        self.peak_memory_gib = max(float(every[:, -1].max()), peak_memory_gib(self.device))
        step_time = seconds / max(self.steps, 1)
        self.counts, self.steps = TokenCounts(), 0
        self.total += job
        self.total_seconds += seconds
        return {"step_time_s": step_time, **self._rates(job, seconds)}

    def summary(self) -> dict[str, float]:
        """The same rates over all readings of this process, and the sums."""
        return {
            "train_steps_s": self.total_seconds,
            "tokens": self.total.real,
            "trained_tokens": self.total.trained,
            "model_flops": self.flops.step(self.total),
            **self._rates(self.total, self.total_seconds),
        }

    def _rates(self, counts: TokenCounts, seconds: float) -> dict[str, float]:
        per_gpu = 1 / (max(seconds, 1e-9) * self._ranks)
        rates = {
            "tokens_per_s_per_gpu": counts.real * per_gpu,
            "trained_tokens_per_s_per_gpu": counts.trained * per_gpu,
            "padding_share": counts.padding_share(),
            "shared_share": counts.shared / counts.real if counts.real else 0.0,
            "tflops_per_gpu": self.flops.step(counts) * per_gpu / 1e12,
            "peak_memory_gib": self.peak_memory_gib,
        }
        if self.peak_tflops is not None:
            rates["mfu"] = rates["tflops_per_gpu"] / self.peak_tflops
            rates["mfu_6n"] = self.flops.step_6n(counts) * per_gpu / 1e12 / self.peak_tflops
        return rates


def device_name(device: torch.device) -> str:
    """The accelerator's name as its driver gives it; "cpu" on a CPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type

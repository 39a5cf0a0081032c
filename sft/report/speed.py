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
    "B200": 2250, "MI300X": 1307, "MI325X": 1307, "GH200": 989, "H200": 989, "H100": 989, "H800": 989, "H200 NVL": 835,
    "H100 NVL": 835, "H100 PCIe": 756, "RTX 6000 Ada": 364, "L40S": 362, "A100": 312, "A800": 312, "RTX 5090": 210,
    "L40": 181, "A30": 165, "RTX 4090": 165, "RTX A6000": 155, "A40": 150, "H20": 148, "A10": 125, "V100": 125,
    "L4": 121, "RTX 4080": 97, "RTX 3090": 71, "A10G": 70, "T4": 65,
}  # fmt: skip
# Cut-down or partitioned devices carry the full device's name and reach less.
OTHER_DEVICES = re.compile(r"MIG|Laptop|Max-Q|SUPER|RTX 4090 D")
MFU_CONVENTION = (
    "6 FLOPs per weight and real token (4 where frozen; shared prefixes once), input embedding left out, head on trained tokens only, "
    "+ 6 x layers x heads x head_dim x sum of len^2 (causal half)"
)


def peak_tflops(device: torch.device, compute_dtype: torch.dtype) -> float | None:
    """The device's dense 16-bit peak in TFLOP/s; None for an unknown device, or for a run that computes in float32."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    found = [known for known in PEAK_TFLOPS if re.search(rf"\b{known}\b", name)]
    comparable = compute_dtype in (torch.bfloat16, torch.float16) and not OTHER_DEVICES.search(name)
    return PEAK_TFLOPS[max(found, key=len)] if found and comparable else None


@dataclass(frozen=True)
class ModelFlops:
    """Floating-point operations that a training step must do, by the model's shape.

    A weight costs 2 in the forward pass for each token and 4 in the backward pass (2 if the weight is frozen: only the
    gradient of its input is needed). Attention costs 12 x layers x heads x head_dim x sum of len^2, scores and values,
    forward and backward; a causal model needs half of it. Recomputed activations are not counted (MFU, not HFU).
    """

    layers: int  # for each token: 6 for an element of the layers' matrices, LoRA's included, 4 where it is frozen
    head: int  # the same of the output head
    attention_width: int  # layers x heads x head_dim

    @classmethod
    def of(cls, model: Any) -> "ModelFlops":
        """Count from the shapes of the linear layers: right for sharded (ZeRO-3), quantized and LoRA weights as well."""
        config, head = model.config, model.get_output_embeddings()
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        costs = {"layers": 0, "head": 0}
        for name, module in model.named_modules():
            # peft keeps the untrained copy of a fully trained module next to it, and wraps a layer under `base_layer`
            if isinstance(module, torch.nn.Linear) and ".original_module" not in name:
                part = "head" if module is head or name.split(".base_layer")[0].endswith("lm_head") else "layers"
                costs[part] += (6 if module.weight.requires_grad else 4) * module.in_features * module.out_features
        return cls(**costs, attention_width=config.num_hidden_layers * config.num_attention_heads * head_dim)

    def step(self, counts: TokenCounts, usual: bool = False) -> int:
        """FLOPs of these examples. Neither convention counts a shared prefix more than once.

        Args:
            usual: the formula of PaLM and its followers, to compare with other programs (`mfu_6n`): the head for every token and
                the whole of len^2. Otherwise what the recipe needs (`mfu`): the causal half, the head on trained tokens.
        """
        computed, attention = counts.real - counts.shared, self.attention_width * counts.squared
        if usual:
            return (self.layers + self.head) * computed + 12 * attention
        return self.layers * computed + self.head * counts.trained + 6 * attention


def peak_memory_gib(device: torch.device) -> float:
    """Highest memory of this process so far, GiB: the CUDA allocator's on a GPU, the process's resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # ru_maxrss is in KiB on Linux and in bytes on macOS (getrusage(2) of each)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**30 if sys.platform == "darwin" else 2**20)


class Meter(transformers.TrainerCallback):
    """A stopwatch over training steps, and a count of their tokens (names and units of its numbers: docs/run_report.md).

    It runs only while steps run: as the Trainer's last callback it pauses before an evaluation or a save.
    """

    def __init__(self, flops: ModelFlops, device: torch.device, peak: float | None):
        self.flops, self.device, self.peak_tflops = flops, device, peak  # that MFU refers to; None: not known
        self.counts, self.steps = TokenCounts(), 0  # of this rank, since the last reading
        # of the job, in this process's life
        self.total, self.total_seconds, self.peak_memory_gib, self._ranks = TokenCounts(), 0.0, 0.0, 1
        self._seconds = 0.0  # since the last reading, until `_since`
        self._since: float | None = None  # None while the clock stands

    def facts(self) -> dict[str, Any]:
        """What MFU means here: the record's section `throughput`."""
        return {"mfu_convention": MFU_CONVENTION} | ({"peak_tflops": self.peak_tflops} if self.peak_tflops else {})

    def add_step(self, counts: TokenCounts) -> int:
        """Count one optimizer step's micro-batches of this rank; the first step starts the clock. Returns its FLOPs."""
        if self._since is None:
            self._since = time.perf_counter()
        self.counts += counts
        self.steps += 1
        return self.flops.step(counts)

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_evaluate or control.should_save:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # its work belongs to the step
            self._lap()
            self._since = None

    def on_save(self, args, state, control, **kwargs):
        self._since = time.perf_counter()

    on_epoch_end, on_evaluate = on_step_end, on_save

    def _lap(self) -> None:
        if self._since is not None:
            now = time.perf_counter()
            self._seconds, self._since = self._seconds + now - self._since, now

    def own(self) -> list[float]:
        """This rank's counts since the last reading and its peak memory in GiB, to be gathered for `read`."""
        return [*astuple(self.counts), peak_memory_gib(self.device)]

    def read(self, every: torch.Tensor) -> dict[str, float]:
        """The job's rates since the last reading. Call it at one point of each step: once the host has the gradient norm.

        Args:
            every: (ranks, numbers), what `own` gave on each rank in this step.
        """
        self._lap()
        job, seconds = TokenCounts(*(int(total) for total in every[:, :-1].sum(dim=0))), self._seconds
        # `every` is from before this step's update; the optimizer takes its memory in the first update
        self.peak_memory_gib = max(float(every[:, -1].max()), peak_memory_gib(self.device))
        step_time, self._ranks = seconds / max(self.steps, 1), len(every)
        self.counts, self.steps, self._seconds = TokenCounts(), 0, 0.0
        self.total += job
        self.total_seconds += seconds
        return {"step_time_s": step_time} | self._rates(job, seconds)

    def summary(self) -> dict[str, float]:
        """The same rates over all readings of this process, and the sums."""
        sums = {"train_steps_s": self.total_seconds, "tokens": self.total.real, "trained_tokens": self.total.trained}
        flops = {"model_flops": self.flops.step(self.total)}
        return sums | flops | self._rates(self.total, self.total_seconds)

    def _rates(self, counts: TokenCounts, seconds: float) -> dict[str, float]:
        per_gpu = 1 / (max(seconds, 1e-9) * self._ranks)
        tflops, tflops_6n = (self.flops.step(counts, usual) * per_gpu / 1e12 for usual in (False, True))
        rates = {
            "tokens_per_s_per_gpu": counts.real * per_gpu,
            "trained_tokens_per_s_per_gpu": counts.trained * per_gpu,
            "padding_share": counts.padding_share(),
            "shared_share": counts.shared / counts.real if counts.real else 0.0,
            "tflops_per_gpu": tflops,
            "peak_memory_gib": self.peak_memory_gib,
        }
        if self.peak_tflops is not None:
            rates |= {"mfu": tflops / self.peak_tflops, "mfu_6n": tflops_6n / self.peak_tflops}
        return rates

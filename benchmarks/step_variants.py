"""What bench_step.py runs: models, recipes, rows, and the Trainers of this project, of its padded ancestor and of TRL."""

import csv
import dataclasses
import itertools
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch.utils.data import Dataset
from transformers import LlamaConfig, LlamaForCausalLM

import utils
from sft.data.llama_tokenizer import load_llama_tokenizer
from sft.flags import parse
from sft.plan.settle import Settled, prepare_step, settle
from sft.run.prepare import Run
from sft.run.trainer import SupervisedTrainer
from sft.step import attention
from sft.step.counts import TokenCounts
from sft.step.packed_rows import in_common
from utils import IGNORE_INDEX

LENGTHS = Path(__file__).with_name("instruction_lengths.csv")

SHAPES: dict[str, dict[str, Any]] = {
    "1.1B": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "num_key_value_heads": 4},
    "7B-shaped, 8 layers": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 8},
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 512,
    },
    "check": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 2, "num_key_value_heads": 4},
    "check, heads of 100": {"hidden_size": 3200, "intermediate_size": 8640, "num_hidden_layers": 2},
}


@dataclasses.dataclass(frozen=True)
class Scenario:
    """A model and a recipe. Steps are (warm-up, measured).

    The warm-up compiles, and loads most of cuBLAS's kernels: it takes another one for another length of row, and the first use of
    each stops the GPU.
    """

    shape: str
    per_device: int
    accumulation: int
    max_length: int
    variants: tuple[str, ...]
    steps: tuple[int, int]
    slow_steps: tuple[int, int]  # of variants that take seconds for one step

    @property
    def examples(self) -> int:
        return self.per_device * self.accumulation


GPU_VARIANTS = ("ancestor", "trl_default", "trl_best", "trl_best_whole", "ours", "ours_unshared")
SCENARIOS = {
    # the original's command: --per_device_train_batch_size 2 --gradient_accumulation_steps 8 --model_max_length 1024
    "original": Scenario("1.1B", 2, 8, 1024, GPU_VARIANTS, (30, 60), (1, 4)),
    "large": Scenario("1.1B", 16, 8, 1024, GPU_VARIANTS, (10, 30), (1, 3)),
    "7b": Scenario("7B-shaped, 8 layers", 16, 8, 1024, GPU_VARIANTS, (6, 16), (1, 2)),
    "cpu": Scenario("tiny", 2, 8, 128, ("ancestor", "ours", "ours_unshared"), (2, 20), (2, 20)),
}
OURS = {  # their flags
    "ancestor": ["--packing", "False"],
    "ours": [],
    "ours_unshared": ["--share_prefixes", "False"],
    "ours_launched": ["--capture_steps", "False"],
}
SLOW = ("ancestor", "trl_default")
WHAT = {
    "ancestor": "padded, stock attention and loss (--packing False)",
    "ours": "this project's defaults",
    "ours_unshared": "this project with --share_prefixes False",
    "ours_launched": "this project with --capture_steps False",
    "trl_default": "SFTTrainer's defaults: padded, gradient checkpointing",
    "trl_best": "SFTTrainer: packed rows, Liger, no checkpointing, our attention kernel; 2 rows x 3 micro-batches",
    "trl_best_whole": "the same, the whole step in one micro-batch",
}


# ---------------------------------------------------------------------------------------------------------------- rows


def read_lengths(path: Path) -> np.ndarray:
    """(examples, 3), in the order of their tokens: prompt tokens, tokens in all with the response and EOS, and how many of the
    prompt's tokens are those of the example before. `lengths_of` 9,314 real instructions by Mistral's first tokenizer, at most 1,024 tokens.
    """
    with open(path, newline="", encoding="utf-8") as file:
        next(rows := csv.reader(file))
        return np.array([[int(cell) for cell in row] for row in rows])


def lengths_of(data_path: str, tokenizer: str, source: str, target: str) -> np.ndarray:
    """The same of a CSV, by the project's own data path."""
    flags = ["--model_name_or_path", tokenizer, "--data_path", data_path, "--source", source, "--target", target]
    model_args, data_args, training_args = parse([*flags, "--output_dir", tempfile.mkdtemp()])
    loaded = load_llama_tokenizer(model_args)
    dataset = utils.make_supervised_data_module(loaded, data_args, training_args)["train_dataset"]
    ids = [example["input_ids"].numpy() for example in dataset]
    prompts = [tokens[:length] for tokens, length in zip(ids, dataset.prompt_lengths)]
    order = sorted(range(len(prompts)), key=lambda index: prompts[index].tolist())
    alike = [0, *(in_common(prompts[one], prompts[other]) for one, other in itertools.pairwise(order))]
    return np.stack([dataset.prompt_lengths[order], dataset.lengths[order], alike], axis=1)


class RandomRows(Dataset):
    """Rows of random ids with given lengths, whose prompts begin alike as far as the given ones do; the prompt's labels are
    masked. What `utils.SupervisedDataset` gives.

    Args:
        lengths: from `read_lengths`.
        max_length: longer rows are cut.
        vocabulary: ids are below it.
    """

    def __init__(self, lengths: np.ndarray, max_length: int, vocabulary: int):
        random = np.random.default_rng(0)
        rows, before = [], np.zeros(0, np.uint16)
        for prompt, total, alike in lengths:
            ids = random.integers(3, vocabulary, total, dtype=np.uint16)
            ids[:alike] = before[:alike]
            if prompt < max_length:  # as the data path: a prompt that leaves no room is dropped
                rows.append((prompt, ids[:max_length]))
            before = ids
        order = random.permutation(len(rows))  # sources lie side by side
        self.prompt_lengths = np.array([rows[index][0] for index in order], dtype=np.int32)
        self.lengths = np.array([len(rows[index][1]) for index in order], dtype=np.int32)
        self.ends = np.cumsum(self.lengths, dtype=np.int64)
        self.tokens = np.concatenate([rows[index][1] for index in order])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        end = self.ends[index]
        input_ids = torch.from_numpy(self.tokens[end - self.lengths[index] : end].astype(np.int64))
        labels = input_ids.clone()
        labels[: self.prompt_lengths[index]] = IGNORE_INDEX
        return {"input_ids": input_ids, "labels": labels}


# ------------------------------------------------------------------------------------------------------------ trainers


def make_model(shape: str, device: torch.device, kernel: str | None, **other: int) -> LlamaForCausalLM:
    """Random float32 weights, the same ones each time."""
    config = LlamaConfig(
        **{"num_attention_heads": 32, "vocab_size": 32000, "max_position_embeddings": 2048} | SHAPES[shape] | other
    )
    config.use_cache, config.pad_token_id = False, 0
    config._attn_implementation = kernel or "sdpa"
    torch.manual_seed(0)
    with torch.device(device):
        return LlamaForCausalLM(config)


def our_trainer(
    scenario: Scenario, rows: RandomRows, device: torch.device, extra: list[str]
) -> tuple[SupervisedTrainer, Settled]:
    """The Trainer of a run with the original command's flags, by the calls of `utils.train`, and what was settled for it."""
    folder = tempfile.mkdtemp()
    # what the proof reads of a checkpoint: its config and its first layers
    make_model(scenario.shape, torch.device("cpu"), None, num_hidden_layers=2).save_pretrained(folder)
    make_model(scenario.shape, torch.device("meta"), None).config.save_pretrained(folder)
    flags = (
        f"--model_name_or_path {folder} --data_path random --learning_rate 2e-5 --weight_decay 0. --warmup_ratio 0.05 "
    )
    flags += "--lr_scheduler_type cosine --logging_steps 1 --save_strategy no --max_steps 6000 "
    flags += f"--model_max_length {scenario.max_length} --per_device_train_batch_size {scenario.per_device} "
    flags += f"--gradient_accumulation_steps {scenario.accumulation} --output_dir {tempfile.mkdtemp()}"
    bf16 = ["--bf16", str(device.type == "cuda")]
    model_args, data_args, args = parse([*flags.split(), "--save_rehearsal", "False", *bf16, *extra])
    run = Run(model_args, data_args, args)
    settled = settle(model_args, args, rows)
    model = make_model(scenario.shape, device, settled.attention.value)
    tokenizer = any_tokenizer()
    collator = utils.DataCollatorForSupervisedDataset(tokenizer)
    data_module = {"train_dataset": rows, "eval_dataset": None, "data_collator": collator}
    return run.build_trainer(model, prepare_step(model, settled), settled, tokenizer, data_module), settled


def any_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """Trainers want one; it tokenizes nothing here."""
    from tokenizers import Tokenizer, models

    words = {"<unk>": 0, "<s>": 1, "</s>": 2}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, "<unk>")),
        pad_token="<unk>",
        eos_token="</s>",
        bos_token="<s>",
    )


def trl_trainer(variant: str, scenario: Scenario, rows: RandomRows, device: torch.device) -> transformers.Trainer:
    """TRL's SFTTrainer on the same rows."""
    from datasets import Dataset as Table
    from datasets import disable_progress_bars
    from trl import SFTConfig, SFTTrainer

    disable_progress_bars()
    count = min(len(rows), scenario.examples * (sum(scenario.steps) + 4))  # no epoch ends among the measured steps
    examples = [rows[index] for index in range(count)]
    table = Table.from_dict(
        {name: [example[name].tolist() for example in examples] for name in ("input_ids", "labels")}
    )
    options: dict[str, Any] = {
        "per_device_train_batch_size": scenario.per_device,
        "gradient_accumulation_steps": scenario.accumulation,
        "max_length": scenario.max_length,
    }
    kernel = None
    if variant != "trl_default":
        tokens = int(rows.lengths.mean() * scenario.examples)  # of one optimizer step
        per_device, accumulation = (2, 3) if variant == "trl_best" and scenario.examples > 16 else (1, 1)
        whole = 6 if variant == "trl_best_whole" and scenario.examples > 16 else 1
        options = {
            "per_device_train_batch_size": per_device * whole,
            "gradient_accumulation_steps": accumulation,
            "max_length": max(tokens // (per_device * accumulation * whole), int(rows.lengths.max())),
            "packing": True,
            "use_liger_kernel": device.type == "cuda",
            "gradient_checkpointing": False,
        }
        kernel = attention.PER_EXAMPLE
        if device.type == "cuda":
            from sft.step import attention_kernel  # noqa: F401  registers its operator

            kernel = attention.TRITON
    config = SFTConfig(
        output_dir=tempfile.mkdtemp(), max_steps=6000, learning_rate=2e-5, lr_scheduler_type="cosine", save_strategy="no", logging_steps=1,
        report_to="none", bf16=device.type == "cuda", use_cpu=device.type == "cpu", **options,
    )  # fmt: skip
    model = make_model(scenario.shape, device, kernel)
    return SFTTrainer(model=model, args=config, train_dataset=table, processing_class=any_tokenizer())


# --------------------------------------------------------------------------------------------------------------- clock


class Clock(transformers.TrainerCallback):
    """Times the measured steps and ends the run after them."""

    def __init__(self, warm_up: int, steps: int, device: torch.device):
        self.warm_up, self.steps, self.device = warm_up, steps, device
        self.seconds = self.began = self.first = 0.0
        self.measuring = False
        self.batches: list[dict] = []  # of the measured steps; counted afterwards, when it costs no time
        self.meter: Any = None  # ours counts by itself
        self.before: tuple[int, ...] = ()

    def watch(self, trainer: transformers.Trainer) -> "Clock":
        self.meter = getattr(trainer, "meter", None)
        if self.meter is None:
            trainer.model.register_forward_pre_hook(self._look, with_kwargs=True)
        trainer.add_callback(self)
        return self

    def _so_far(self) -> tuple[int, ...]:
        pairs = zip(*map(dataclasses.astuple, (self.meter.total, self.meter.counts))) if self.meter else ()
        return tuple(map(sum, pairs))

    def on_step_begin(self, args, state, control, **kwargs):
        self.measuring = self.warm_up <= state.global_step < self.warm_up + self.steps

    def _look(self, module: torch.nn.Module, args: tuple, inputs: dict) -> None:
        if self.measuring:
            names = ("input_ids", "labels", "attention_mask", "cu_seq_lens_q", "prefix_lengths", "label_positions")
            self.batches.append({name: inputs[name] for name in names if name in inputs})

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            self.first = self.now()
        if state.global_step == self.warm_up:
            self.began, self.before = self.now(), self._so_far()
        if state.global_step == self.warm_up + self.steps:
            self.seconds = self.now() - self.began
            self.before = tuple(now - then for now, then in zip(self._so_far(), self.before))
            control.should_training_stop = True

    def counts(self) -> TokenCounts:
        """What the measured steps held."""
        if self.meter:
            return TokenCounts(*self.before)
        total = TokenCounts()
        for batch in self.batches:
            ids = batch["input_ids"]
            shared = batch.get("prefix_lengths", ids.new_zeros(2)).long()[:-1]
            if "attention_mask" in batch:
                lengths = batch["attention_mask"].sum(dim=1).long()
            else:
                lengths = batch["cu_seq_lens_q"].diff().long() + shared
            packed = "label_positions" in batch
            trained = len(batch["label_positions"]) if packed else int((batch["labels"][:, 1:] != IGNORE_INDEX).sum())
            total += TokenCounts(
                real=int(lengths.sum()),
                trained=trained,
                computed=ids.numel(),
                squared=int((lengths**2).sum() - (shared**2).sum()),
                shared=int(shared.sum()),
            )
        return total

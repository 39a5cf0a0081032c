"""The exported model: written in its type for plain transformers, then read back and proved.

COMPLETE.json says what was found equal. It is the last file of a run: a folder with it holds a finished model.
"""

import hashlib
import json
import math
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sft.job import UserError, say

COMPLETE = "COMPLETE.json"


SMALL_BYTES = 4 * 2**30  # up to this size all tensors are hashed and the model is run, above it a sample is hashed


PROBE_TOKENS = 64


FORWARD_INPUTS = "input_ids attention_mask position_ids cu_seq_lens_q cu_seq_lens_k max_length_q max_length_k".split()


FORWARD_INPUTS += ["prefix_starts", "prefix_lengths"]


Weights = dict[str, torch.Tensor]


def is_finished(output_dir: str | Path) -> bool:
    """Whether a folder holds a model whose export was completed and proved."""
    return Path(output_dir, COMPLETE).is_file()


def is_already_finished(training_args) -> bool:
    """Whether `--resume_from_checkpoint` finds a finished model, as it does when a scheduler starts a run once more. Says so."""
    resumes = str(training_args.resume_from_checkpoint or False).lower() != "false"
    if not resumes or training_args.overwrite_output_dir or not is_finished(training_args.output_dir):
        return False
    step = json.loads(Path(training_args.output_dir, COMPLETE).read_text("utf-8"))["step"]
    say(
        f"{training_args.output_dir} holds the finished and proved model of step {step:,}: nothing is left to do. To train again, "
        "name another --output_dir or give --overwrite_output_dir True."
    )
    return True


def cast_weights(state_dict: Weights, dtype: torch.dtype) -> Weights:
    """Cast floating-point weights; tensors that were one (tied embeddings) stay one."""
    cast: dict[tuple, torch.Tensor] = {}
    for tensor in state_dict.values():
        key = (tensor.data_ptr(), tensor.shape)
        if key not in cast:
            cast[key] = tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype)
    return {name: cast[tensor.data_ptr(), tensor.shape] for name, tensor in state_dict.items()}


class Exporter:
    """Writes down what is exported while it is exported, and proves it afterwards. All ranks make one, after training.

    Args:
        trainer: its `before_writing` sees, and may change, the weights that are about to be written.
        model_args: which model it was, and whether additions (LoRA) were trained.
        dtype: the type of the exported weights; an adapter keeps its own.
    """

    def __init__(self, trainer, model_args, dtype: torch.dtype):
        self.trainer, self.model_args, self.dtype = trainer, model_args, dtype
        self.written: dict[str, dict] = {}  # `describe_weights` of what was handed over
        self.probe = probe_logits(trainer)
        if trainer.is_fsdp_enabled:  # checkpoints may be sharded; the model is one for plain transformers
            trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
        if trainer.args.should_save:
            Path(trainer.args.output_dir, COMPLETE).unlink(missing_ok=True)
        trainer.before_writing = self._note

    def _note(self, state_dict: Weights) -> Weights:
        if self.model_args.use_lora:
            from peft import get_peft_model_state_dict

            self.written = describe_weights(get_peft_model_state_dict(self.trainer.model, state_dict))
            return state_dict
        state_dict = cast_weights(state_dict, self.dtype)
        self.written = describe_weights(state_dict)
        return state_dict

    def save_whole_model(self) -> Path:
        """Save the model and its tokenizer to the output folder, and return it; all ranks together."""
        trainer, folder = self.trainer, Path(self.trainer.args.output_dir)
        trainer.model.config.use_cache = True
        trainer.save_model()
        if trainer.args.should_save:
            config = AutoConfig.from_pretrained(folder)
            config.dtype = self.dtype  # save_pretrained (5.23) writes the type of the live weights
            config.save_pretrained(folder)
        return folder

    def prove(self, saved: Path) -> list[str]:
        """Read back what lies in the output folder; rank 0 alone.

        Args:
            saved: the folder of the weights that were handed over: the output folder, or the adapter's inside of it.

        Returns: one sentence for each thing that was found equal.

        Raises:
            UserError: with everything that is wrong.
        """
        trainer, folder = self.trainer, Path(self.trainer.args.output_dir)
        tokenizer, dataset = trainer.processing_class, trainer.train_dataset
        make_readable(saved)
        problems = check_weights(saved, self.written)
        hashed = sum(about["sha256"] is not None for about in self.written.values())
        proved = [
            f"{len(self.written)} tensors have the names, shapes and types that were trained, are finite and not all zero",
            f"{hashed} of {len(self.written)} tensors have the hash of the trained weight",
        ]
        if saved != folder:
            make_readable(folder)
            problems += check_weights(folder, None)
            proved.append("the merged weights are finite and not all zero")
        rows = trainer.model.config.vocab_size
        problems += self._check_embedding(rows)
        texts = [
            tokenizer.decode(dataset[index]["input_ids"], skip_special_tokens=True)
            for index in range(min(50, len(dataset)))
        ]
        texts += [" two  spaces\n\ttab", "naïve 漢字 🙂"]
        problems += check_tokenizer(folder, tokenizer, texts, rows)
        proved.append(
            f"the tokenizer reloads to the same ids on {len(texts)} texts, all below the embedding's {rows} rows"
        )
        if not problems and self._is_small() and not self.model_args.load_in_4bit:
            exact = self.dtype == torch.float32 and not (trainer.args.bf16 or trainer.args.fp16)
            problems += check_logits(self._reload(saved), *self.probe, exact)
            rounding = "" if exact else ", up to rounding"
            proved.append(
                f"the reloaded model gives the trained model's logits on {self.probe[0].numel()} tokens{rounding}"
            )
        if problems:
            raise UserError(
                [f"{folder}: {problem}" for problem in problems]
                + ["The export is not complete; the checkpoints are untouched."]
            )
        return proved

    def _check_embedding(self, rows: int) -> list[str]:
        if self.model_args.use_lora:
            return []
        model = self.trainer.model
        weight = model.get_input_embeddings().weight
        name = next(name for name, parameter in model.named_parameters() if parameter is weight)
        found = self.written.get(name, {"shape": [0]})["shape"][0]
        return [] if found == rows else [f"{name} has {found} rows, and the model's vocabulary {rows}"]

    def _is_small(self) -> bool:
        parameters = sum(getattr(p, "ds_numel", p.numel()) for p in self.trainer.model.parameters())
        return parameters * self.dtype.itemsize <= SMALL_BYTES

    def _reload(self, saved: Path) -> torch.nn.Module:
        folder = Path(self.trainer.args.output_dir)
        if not self.model_args.use_lora or saved != folder:
            return AutoModelForCausalLM.from_pretrained(folder)
        from peft import PeftModel

        base = AutoModelForCausalLM.from_pretrained(
            self.model_args.model_name_or_path, cache_dir=self.model_args.cache_dir, dtype=self.dtype
        )
        return PeftModel.from_pretrained(base, folder)


def make_readable(folder: Path) -> None:
    """Give weights the mode of the files beside them: safetensors (0.8) creates its own readable by the owner alone."""
    mode = Path(folder, "tokenizer_config.json").stat().st_mode
    for file in folder.glob("*.safetensors"):
        file.chmod(mode & 0o777)


def digest(tensor: torch.Tensor) -> str:
    """SHA-256 of a tensor's bytes."""
    values = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return hashlib.sha256(values.data).hexdigest()


def describe_weights(state_dict: Weights) -> dict[str, dict]:
    """What is about to be written: shape, type and, of all tensors or of a sample spread over a large model, the hash.

    Tensors that share their memory (tied embeddings) are written once: each names the others as its `twins`.
    """
    stride = math.ceil(sum(tensor.nbytes for tensor in state_dict.values()) / SMALL_BYTES) or 1
    names_at: dict[tuple, list[str]] = {}
    for name, tensor in state_dict.items():
        names_at.setdefault((tensor.data_ptr(), tensor.shape), []).append(name)
    return {
        name: {
            "shape": list(tensor.shape),
            "dtype": str(tensor.dtype),
            "sha256": digest(tensor) if index % stride == 0 else None,
            "twins": [other for other in names_at[tensor.data_ptr(), tensor.shape] if other != name],
        }
        for index, (name, tensor) in enumerate(state_dict.items())
    }


def weight_files(folder: Path) -> tuple[list[Path], list[str]]:
    """The files that hold a saved model's or adapter's weights, and what is wrong with the index of its shards."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        adapter = folder / "adapter_model.safetensors"
        return [adapter if adapter.is_file() else folder / "model.safetensors"], []
    weight_map = json.loads(index.read_text("utf-8"))["weight_map"]
    files = sorted({folder / name for name in weight_map.values()})
    problems = [f"{index.name} names {file.name}, which is missing" for file in files if not file.is_file()]
    for file in (file for file in files if file.is_file()):
        with safe_open(file, "pt") as opened:
            listed = {name for name, where in weight_map.items() if where == file.name}
            different = sorted(listed ^ set(opened.keys()))
            problems += [f"{index.name} and {file.name} disagree about {name}" for name in different]
    return files, problems


def check_weights(folder: Path, written: dict[str, dict] | None) -> list[str]:
    """Compare the weights on the disk with those handed over for writing; each must be finite and not all zero.

    Args:
        written: from `describe_weights`; None looks at the values alone.
    """
    files, problems = weight_files(folder)
    seen: set[str] = set()
    for file in files:
        if not file.is_file():
            problems += [] if file.name.startswith("model-") else [f"{file.name} is missing"]
            continue
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - safe_open is no mapping
                seen.add(name)
                tensor = opened.get_tensor(name)
                problems += _check_values(name, tensor)
                if written is not None:
                    problems += _compare(file.name, name, tensor, written.get(name))
    lost = [name for name, about in (written or {}).items() if name not in seen and not seen & set(about["twins"])]
    return problems + [f"{name} was not saved" for name in lost]


def _check_values(name: str, tensor: torch.Tensor) -> list[str]:
    if not tensor.isfinite().all():
        return [f"{name} holds NaN or infinity"]
    may_be_zero = name.endswith("bias") or "lora_B" in name  # they begin as zeros
    return [] if may_be_zero or tensor.any() else [f"{name} is all zero"]


def _compare(file: str, name: str, tensor: torch.Tensor, expected: dict | None) -> list[str]:
    if expected is None:
        return [f"{file} holds {name}, which the model does not have"]
    found = {"shape": list(tensor.shape), "dtype": str(tensor.dtype)}
    problems = [
        f"{name}: {key} is {value}, not {expected[key]}" for key, value in found.items() if value != expected[key]
    ]
    if not problems and expected["sha256"] and digest(tensor) != expected["sha256"]:
        problems.append(f"{name}: its bytes are not the trained weight's")
    return problems


def check_tokenizer(folder: Path, tokenizer, texts: list[str], embedding_rows: int) -> list[str]:
    """The saved tokenizer must give the training tokenizer's ids, and none beyond the embedding."""
    reloaded = AutoTokenizer.from_pretrained(folder)
    # verbose: a cell longer than --model_max_length is nothing to warn about here
    ids = [reloaded(text, verbose=False)["input_ids"] for text in texts]
    problems = [
        f"the reloaded tokenizer gives other ids for {text[:60]!r}"
        for text, found in zip(texts, ids)
        if found != tokenizer(text, verbose=False)["input_ids"]
    ]
    special = [reloaded.eos_token_id, reloaded.bos_token_id, reloaded.pad_token_id]
    largest = max([*(i for found in ids for i in found), *(i for i in special if i is not None)], default=0)
    if largest >= embedding_rows:
        problems.append(f"the tokenizer has id {largest} and the embedding {embedding_rows} rows")
    return problems


def probe_logits(trainer) -> tuple[torch.Tensor, torch.Tensor]:
    """The trained model's answer to the beginning of the first example; all ranks together.

    Returns: input_ids (1, tokens) and logits (1, tokens, vocabulary), float32 on the CPU.
    """
    example = {name: values[:PROBE_TOKENS] for name, values in trainer.train_dataset[0].items()}
    batch = trainer.data_collator([example])
    inputs = {name: batch[name] for name in FORWARD_INPUTS if name in batch}
    model = trainer.model_wrapped
    model.eval()
    with torch.no_grad(), trainer.compute_loss_context_manager():
        logits = model(**trainer._prepare_inputs(inputs), use_cache=False).logits
    return inputs["input_ids"].cpu(), logits.float().cpu()


def check_logits(model: torch.nn.Module, input_ids: torch.Tensor, trained: torch.Tensor, exact: bool) -> list[str]:
    """The reloaded model's logits must be the trained model's, up to the rounding of its type.

    Measured by ‖difference‖ / ‖trained‖. bfloat16 keeps 8 bits, 0.4 % in each of the sums that make a logit; another
    model's logits differ by about 1.
    """
    model.eval()
    with torch.no_grad():
        reloaded = model(input_ids=input_ids, use_cache=False).logits.float()
    difference = float((reloaded - trained).norm() / trained.norm())
    allowed = 1e-4 if exact else 5e-2
    if difference <= allowed:  # NaN is not
        return []
    return [f"the reloaded model's logits differ from the trained model's by {difference:.2g} of their norm"]


def complete(output_dir: str, step: int, proved: list[str]) -> None:
    """Write COMPLETE.json; rank 0 calls it when nothing else is left to write."""
    folder = Path(output_dir)
    files = {file.name: file.stat().st_size for file in weight_files(folder)[0]}
    text = json.dumps({"step": step, "proved": proved, "bytes": files}, indent=1)
    Path(folder, COMPLETE).write_text(text + "\n", encoding="utf-8")

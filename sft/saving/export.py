"""Write the exported model for plain transformers, then read it back and prove it.

COMPLETE.json lists what was proved and the files that hold the weights. It is the last file of a finished run.
"""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from safetensors import SafetensorError, safe_open
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.core_model_loading import revert_weight_conversion

from sft.data.template import Template
from sft.job import UserError, say, sync
from sft.model import headers, lora
from sft.model.loading import numel
from sft.outside import read_object
from sft.saving import export_files
from sft.saving.checkpoint import (
    INCOMPLETE,
    describe_file,
    gather,
    make_readable,
    newest_first,
    why_not_whole,
    write_json,
)
from sft.saving.client_proof import ROWS, ask_as_clients, trained_prompts

COMPLETE = "COMPLETE.json"
SMALL_BYTES = 4 * 2**30  # up to this size all tensors are hashed and the model is run, above it a sample is hashed
PROBE_TOKENS = 64
FORWARD_INPUTS = "input_ids attention_mask position_ids cu_seq_lens_q cu_seq_lens_k max_length_q max_length_k".split()
FORWARD_INPUTS += ["prefix_starts", "prefix_lengths"]

Weights = dict[str, torch.Tensor]


def is_already_finished(training_args) -> bool:
    """Whether `--resume_from_checkpoint` finds a finished model, as it does when a scheduler starts a run once more. Prints it.

    Raises UserError where the command asks for more steps than that run had.
    """
    folder = Path(training_args.output_dir)
    resumes = str(training_args.resume_from_checkpoint or False).lower() != "false"
    there = resumes and not training_args.overwrite_output_dir and (folder / COMPLETE).is_file()
    if not gather(there)[0]:  # all ranks ask, also one whose command differs: it would wait for the others
        return False
    problem = why_not_whole(folder, COMPLETE)
    if problem:
        say(f"warning: the finished model that {folder / COMPLETE} lists is not there: {problem}. The run goes on.")
        return False
    if more := gather(_more_steps(training_args, folder))[0]:
        raise UserError(more)
    step = int(read_object(folder / COMPLETE)["step"])
    again = "To train again, name another --output_dir or give --overwrite_output_dir True."
    say(f"{folder} holds the finished and proved model of step {step:,}: nothing is left to do. {again}")
    return True


def _more_steps(training_args, folder: Path) -> str | None:
    """What to do where more steps are asked for than the finished run was to take; None without its record."""
    try:
        batch = read_object(folder / "run_report.json")["batch"]
        epochs = math.ceil(training_args.num_train_epochs * batch["steps_per_epoch"])
        wanted = training_args.max_steps if training_args.max_steps > 0 else epochs
        if wanted <= batch["steps"]:
            return None
    except (OSError, ValueError, LookupError, TypeError):
        return None
    cure = f"Begin a new run with --model_name_or_path {folder} and another --output_dir."
    if checkpoints := newest_first(folder):
        cure = f"To go on from {checkpoints[0].name}, add --overwrite_output_dir True --resume_with_changes True."
    return f"{folder} holds the finished model of a run of {batch['steps']:,} steps, and this command asks for {wanted:,}. {cure}"


def complete(output_dir: str, step: int, proved: list[str], files: dict[str, dict]) -> None:
    """Write COMPLETE.json when the model is on the disk; rank 0 calls it when nothing else is left to write.

    Args:
        files: of `describe_files`.
    """
    folder = Path(output_dir)
    written = [file for file in (*folder.iterdir(), *folder.glob("adapter/*")) if file.is_file()]
    sync(*written, *{file.parent for file in written})
    write_json(folder / COMPLETE, {"step": step, "proved": proved, "files": files})


def describe_files(folder: Path) -> dict[str, dict]:
    """The files of weights, as COMPLETE.json lists them, when they are on the disk."""
    found = {}
    for name in weight_files(folder):
        sync(folder / name)
        found[name] = describe_file(folder / name)  # by several threads for each file
    return found


def side_by_side(function: Callable, items: Iterable) -> list:
    """The results of a function that reads or hashes large tensors: Python lets other threads run meanwhile."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(function, items))


def gather_weights(trainer, dtype: torch.dtype, up_to_bytes: float = math.inf) -> Weights:
    """Gather what was trained, one tensor after another, from wherever the engine keeps it; all ranks together.

    Args:
        dtype: type of a whole model's weights; an adapter keeps its own.
        up_to_bytes: gather the first weights up to this size, at least one.

    Returns: on the ranks that save, weights on the CPU; tensors that were one (tied embeddings) stay one. Elsewhere nothing.
    """
    opened: Any = nullcontext  # what makes a tensor whole for a while
    if trainer.is_deepspeed_enabled:
        import deepspeed

        opened = deepspeed.zero.GatheredParameters
        # after a forward pass alone (an evaluation, the proof's) ZeRO-3 (0.19.8) has weights under way for a backward pass: it
        # cannot gather those
        trainer.deepspeed.empty_partition_cache()
    trained = {name: weight for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    adapter = len(trained) < len(list(trainer.model.parameters()))
    # bitsandbytes (0.50) cannot make the state_dict of 4-bit weights that ZeRO-3 has split
    tensors = trained if adapter else trainer.model.state_dict(keep_vars=True)
    weights: Weights = {}
    seen: dict[int, torch.Tensor | None] = {}
    for name, tensor in tensors.items():
        if id(tensor) not in seen:
            with opened([tensor]), torch.no_grad():
                weight = tensor.detach()
                if isinstance(weight, DTensor):  # offloaded shards are gathered on the GPU: NCCL knows no other place
                    weight = weight.to(weight.device_mesh.device_type).full_tensor()
                kept = weight.dtype if adapter or not weight.is_floating_point() else dtype
                up_to_bytes -= weight.numel() * kept.itemsize
                if seen and up_to_bytes < 0:
                    break
                # in its type first: a copy from a GPU would take float32 along and convert it on the CPU
                seen[id(tensor)] = weight.to(kept).to("cpu", copy=True) if trainer.args.should_save else None
        if trainer.args.should_save:
            weights[name] = seen[id(tensor)]
    return weights


def count_weights(model: torch.nn.Module) -> tuple[int, int]:
    """Weights of the whole model, and the trained ones."""
    sizes = [(numel(p), p.requires_grad) for p in model.parameters()]
    return sum(n for n, _ in sizes), sum(n for n, trained in sizes if trained)


class Exporter:
    """Export the model and prove it afterwards. All ranks make one, after training.

    Args:
        dtype: the type of the exported weights; an adapter keeps its own.
        template: what training put its rows into.
        up_to_bytes: of the weights: a rehearsal exports a sample of a large model.
    """

    def __init__(self, trainer, model_args, dtype: torch.dtype, template: Template, up_to_bytes: float = math.inf):
        self.trainer, self.model_args, self.dtype, self.template = trainer, model_args, dtype, template
        self.folder, self.up_to_bytes = Path(trainer.args.output_dir), up_to_bytes
        # the trained weights are in the output folder, or in `adapter` inside it where the merged model takes that
        self.trained = self.folder / "adapter" if model_args.merge_lora else self.folder
        self.written: dict[str, dict] = {}  # `describe_weights` of what was handed over for writing
        self.files: dict[str, dict] = {}  # `describe_files`, once they are proved
        self.limits: list[str] = []  # what other programs cannot do with this model, known once it is proved
        compared = up_to_bytes == math.inf and not model_args.load_in_4bit  # 4-bit weights are not reloaded as they are
        self.probe = probe_logits(trainer) if compared else None

    def save(self) -> None:
        """Write the weights and the tokenizer, and the merged model where it is asked for; all ranks together."""
        model, model_args = self.trainer.model, self.model_args
        weights = gather_weights(self.trainer, self.dtype, self.up_to_bytes)
        if not self.trainer.args.should_save:
            return
        (self.folder / "training_args.bin").unlink(missing_ok=True)  # the Trainer's, of an upload during the run
        if model_args.use_lora:
            from peft import get_peft_model_state_dict

            self.written = describe_weights(get_peft_model_state_dict(model, weights))
        else:
            # as save_pretrained writes them: some models' weights have other names, or shapes, in a file (a mixture of experts')
            self.written = describe_weights(revert_weight_conversion(model, weights))
            model.config.use_cache = True
        tokenizer = self.trainer.processing_class
        export_files.end_as_trained(model, tokenizer)
        model.save_pretrained(self.trained, state_dict=dict(weights))
        positions = getattr(model.config, "max_position_embeddings", None)
        export_files.write_tokenizer(tokenizer, self.trained, self.template, positions)
        make_readable(self.trained)
        if model_args.use_lora:
            lora.finish_adapter(self.trained, self.folder, model_args, self.dtype)
        else:
            export_files.finish_config(self.folder, self.dtype)

    def prove(self) -> list[str]:
        """One sentence for each thing that was found equal; all that is wrong is raised in one UserError. Rank 0 alone."""
        with ThreadPoolExecutor(1) as pool:
            files = pool.submit(describe_files, self.folder)
            problems, proved = self.check()
        if problems:
            begins = f"{self.folder}: the export is not complete; the checkpoints are untouched."
            raise UserError("\n".join([begins, *(f"  - {problem}" for problem in problems)]))
        self.files = files.result()
        return proved

    def check(self) -> tuple[list[str], list[str]]:
        """Read back what lies in the output folder: what is wrong, and what was found equal."""
        trainer, tokenizer, folder = self.trainer, self.trainer.processing_class, self.folder
        problems = check_weights(self.trained, self.written)
        tensors, hashed = len(self.written), sum(about["sha256"] is not None for about in self.written.values())
        proved = [
            f"{tensors} tensors have the names, shapes and types that were trained, are finite and not all zero",
            f"{hashed} of {tensors} tensors have the hash of the trained weight",
        ]
        if self.trained != folder:
            problems += check_weights(folder, None)
            proved.append("the merged weights are finite and not all zero")
        embedding = trainer.model.get_input_embeddings().weight
        embedded = getattr(embedding, "ds_shape", embedding.shape)[0]
        if embedded != trainer.model.config.vocab_size:
            problems.append(f"the embedding has {embedded} rows, and the config {trainer.model.config.vocab_size}")
        examples = islice(trainer.train_dataset, ROWS)
        rows = [tokenizer.decode(example["input_ids"], skip_special_tokens=True) for example in examples]
        rows = [text for text in rows if not export_files.control_tokens_in(tokenizer, text)]
        texts = [*rows, " two  spaces\n\ttab", "naïve 漢字 🙂"]
        reloaded = AutoTokenizer.from_pretrained(folder)
        problems += check_tokenizer(reloaded, tokenizer, texts, embedded)
        below = f"all below the embedding's {embedded} rows"
        proved.append(f"the tokenizer reloads to the same ids on {len(texts)} texts, {below}")
        asked = ask_as_clients(folder, reloaded, trained_prompts(trainer.train_dataset, tokenizer, self.template), rows)
        problems, proved, self.limits = problems + asked.problems, proved + asked.proved, asked.limits
        if not problems and not self.model_args.use_lora:
            problems += check_names(trainer.model)
        small = count_weights(trainer.model)[0] * self.dtype.itemsize <= SMALL_BYTES
        if not problems and small and self.probe:
            exact = self.dtype == torch.float32 and not (trainer.args.bf16 or trainer.args.fp16)
            problems = check_logits(self._reload(), *self.probe, exact)
            same = f"the reloaded model gives the trained model's logits on {self.probe[0].numel()} tokens"
            proved.append(same + ", up to rounding" * (not exact))
        return problems, proved

    def _reload(self) -> torch.nn.Module:
        if not self.model_args.use_lora or self.trained != self.folder:
            return AutoModelForCausalLM.from_pretrained(self.folder)
        from peft import PeftModel

        name, cache_dir = self.model_args.model_name_or_path, self.model_args.cache_dir
        base = AutoModelForCausalLM.from_pretrained(name, cache_dir=cache_dir, dtype=self.dtype)
        return PeftModel.from_pretrained(base, self.folder)


def upload(trainer) -> None:
    """With --push_to_hub True upload the output folder, without checkpoints; rank 0 calls it last."""
    args = trainer.args
    if args.push_to_hub:
        ignored = ["_*", ".*", "checkpoint-*", f"{INCOMPLETE}*"]
        where = {"repo_id": trainer.hub_model_id, "revision": args.hub_revision, "commit_message": "Model save"}
        try:
            HfApi().upload_folder(folder_path=args.output_dir, ignore_patterns=ignored, token=args.hub_token, **where)
        except Exception as error:  # of whichever HTTP library the hub's client uses
            why = str(error).replace(args.hub_token or "\0", "***").strip().splitlines()[0]
            raise UserError(
                f"the model in {args.output_dir} is complete and proved, but was not uploaded ({type(error).__name__}: {why}). "
                f"Upload it with: hf upload {trainer.hub_model_id} {args.output_dir}"
            ) from None


def describe(tensor: torch.Tensor, hashed: bool) -> dict[str, Any]:
    """Shape and type and, where asked for, SHA-256 of the bytes; tensors that share their memory have the same `memory`."""
    bits = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data if hashed else b""
    digest = hashlib.sha256(bits).hexdigest() if hashed else None
    return {"shape": list(tensor.shape), "dtype": str(tensor.dtype), "sha256": digest, "memory": tensor.data_ptr()}


def describe_weights(weights: Weights) -> dict[str, dict]:
    """What is about to be written, with the hash of all tensors or of a sample spread over a large model."""
    stride = math.ceil(sum(tensor.nbytes for tensor in weights.values()) / SMALL_BYTES) or 1
    names = list(weights)
    return dict(zip(names, side_by_side(lambda n: describe(weights[names[n]], n % stride == 0), range(len(names)))))


def weight_files(folder: Path) -> dict[str, set[str] | None]:
    """The files of a saved model's or adapter's weights, each with the names that the index of the shards lists for it."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        single = ("adapter_model.safetensors", "model.safetensors")
        return {next((name for name in single if (folder / name).is_file()), single[1]): None}
    names = json.loads(index.read_text("utf-8"))["weight_map"]
    return {file: {name for name, home in names.items() if home == file} for file in dict.fromkeys(names.values())}


def check_names(model: torch.nn.Module) -> list[str]:
    """Plain transformers must find each weight under the name that it is saved by, and in its shape; no weight is read for it."""
    shapes = {
        name: getattr(weight, "ds_shape", weight.shape) for name, weight in model.state_dict(keep_vars=True).items()
    }
    saved = revert_weight_conversion(model, {name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    return headers.differences("the saved model", headers.compare(model, model.config, saved), None)


def check_weights(folder: Path, written: dict[str, dict] | None) -> list[str]:
    """Compare the weights on the disk with those handed over for writing; each must be finite and not all zero.

    Args:
        written: from `describe_weights`; None looks at the values alone.
    """
    problems: list[str] = []
    lost = {name: about["memory"] for name, about in (written or {}).items()}
    for file, listed in weight_files(folder).items():
        try:
            with safe_open(folder / file, "pt") as opened:
                names = sorted(opened.keys())
                disagreed = sorted(listed.symmetric_difference(names)) if listed else []
                problems += [f"the index and {file} disagree about {name}" for name in disagreed]
                for name, problem in zip(names, side_by_side(partial(_problem_of, opened, written), names)):
                    problems += [f"{name}{problem}"] * bool(problem)
                    lost = {other: memory for other, memory in lost.items() if memory != lost.get(name)}
        except FileNotFoundError:
            problems.append(f"{file} is missing")
        except SafetensorError as error:
            problems.append(f"{file} is damaged: {error}")
    return problems + [f"{name} was not saved" for name in lost]


def _problem_of(opened: Any, every: dict[str, dict] | None, name: str) -> str:
    """What is wrong with a tensor that is read back, after its name; nothing when it is as it was written."""
    tensor, written = opened.get_tensor(name), every and every.get(name, {})
    if not tensor.isfinite().all():
        return " holds NaN or infinity"
    if not tensor.any() and not (name.endswith("bias") or "lora_B" in name):  # these begin as zeros
        return " is all zero"
    if not written:
        return "" if written is None else " was saved, which the model does not have"
    found = describe(tensor, hashed=written["sha256"] is not None)
    for key in ("shape", "dtype"):
        if found[key] != written[key]:
            return f": {key} is {found[key]}, not {written[key]}"
    return "" if found["sha256"] == written["sha256"] else ": its bytes are not the trained weight's"


def check_tokenizer(reloaded, tokenizer, texts: list[str], embedding_rows: int) -> list[str]:
    """The saved tokenizer must give the training tokenizer's ids, and none beyond the embedding."""
    # verbose: a cell longer than --model_max_length is nothing to warn about here
    ids, trained = ([by(text, verbose=False)["input_ids"] for text in texts] for by in (reloaded, tokenizer))
    different = [text for text, one, other in zip(texts, ids, trained) if one != other]
    problems = [f"the reloaded tokenizer gives other ids for {text[:60]!r}" for text in different]
    special = [reloaded.eos_token_id, reloaded.bos_token_id, reloaded.pad_token_id]
    largest = max(i or 0 for found in (*ids, special) for i in found)
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
    eager = torch.compiler.set_stance("force_eager")  # layers would be compiled once more, for one forward pass
    with torch.no_grad(), trainer.compute_loss_context_manager(), eager:
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
    if difference <= (1e-4 if exact else 5e-2):  # NaN is not
        return []
    return [f"the reloaded model's logits differ from the trained model's by {difference:.2g} of their norm"]

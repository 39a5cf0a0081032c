"""The path of a training run, in the order that it happens.

file -> template -> tokens and labels -> dataset -> collator -> model -> trainer -> saved model
"""

import gc
import sys
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from sft import IGNORE_INDEX, job
from sft.data import audit, encode, files, mixture, token_cache
from sft.data.segments import Rows
from sft.flags import DataArguments, ModelArguments, TrainingArguments, parse
from sft.model import loading, lora
from sft.plan import settle
from sft.run import prepare

# ----------------------------------------------------------------------------------------------- tokens and labels


def tokenize(rows, tokenizer, allow_control_tokens: bool, max_length: int, **rendered: bool) -> token_cache.Batch:
    """Encode rows of segments, each as the continuation of those before it, and drop or shorten what is too long.

        segments   read        trained         read           trained
        input_ids  prompt,     answer, EOS,    next prompt,   answer, EOS
        labels     IGNORE_INDEX over what is read; the trained ids as they are

    A prompt and its response are the row of one segment of each. Labels follow from where the segments end, which is kept in
    their place. A row that is too long loses whole turns from its end; if the first is too long by itself, it is cut and loses
    its EOS, because it does not end there.

    Args:
        rows: the texts of each row's segments, or in their place what became of a row without any (`token_cache.EMPTY`).
        rendered: what `encode_segments` must know of a template's rendering.
    """
    outcomes = np.array([token_cache.KEPT if isinstance(row, list) else row for row in rows], np.uint8)
    filled = [index for index, row in enumerate(rows) if isinstance(row, list)]
    encoded = encode.encode_segments(tokenizer, [rows[index] for index in filled], allow_control_tokens, **rendered)
    tokens, lengths, prompt_lengths, switches, repeats = (array(kind) for kind in "iiiqB")
    spelt = not rendered.get("rendered")
    for index, segments in zip(filled, encoded, strict=True):
        if segments is None:
            outcomes[index] = token_cache.DISAGREED
            continue
        ends = list(accumulate(map(len, segments)))
        if ends[0] >= max_length:
            outcomes[index] = token_cache.NO_ROOM
            continue
        if ends[-1] > max_length:
            whole = [end for end in ends[1::2] if end <= max_length]
            outcomes[index] = token_cache.SHORTENED if whole else token_cache.CUT
            ends = ends[: 2 * len(whole)] or [ends[0], max_length]
        start = len(tokens)
        if len(ends) > 2:
            switches.extend([start + end for end in ends[1:-1]])
        for segment in segments:
            tokens += segment
        del tokens[start + ends[-1] :]
        lengths.append(ends[-1])
        prompt_lengths.append(ends[0])
        repeats.append(spelt and encode.repeats(tokenizer, rows[index], segments[0], allow_control_tokens))
    return token_cache.Batch(*map(np.array, (tokens, lengths, prompt_lengths, outcomes, switches, repeats)))


def tokenize_file(path: str, tokenizer, data_args: DataArguments, max_length: int) -> token_cache.TokenizedRows:
    """Tokenize a file once for each machine, or open what an earlier run left."""
    rows = Rows(data_args, tokenizer)
    reference = getattr(tokenizer, "reference", None)  # what its ids must equal
    decides: dict[str, Any] = {"max_length": max_length, "allow_control_tokens": data_args.allow_control_tokens}
    key = {
        **decides,
        **rows.key(),
        "version": token_cache.VERSION,
        "file": token_cache.file_digest(path),
        "kind": files.kind_of(path),
        "first_row": files.first_row(path),
        "tokenizer": token_cache.tokenizer_digest(tokenizer),
        "reference": reference and token_cache.file_digest(reference.file),
        "libraries": [transformers.__version__, tokenizers.__version__],
    }

    def tokenize_batch(batch: list[tuple[int, tuple]]) -> token_cache.Batch:
        found = rows.segments(path, batch)
        if reference and batch and batch[0][0] - files.first_row(path) < reference.rows:
            encode.compare_with_reference(tokenizer, rows.plain_texts(found))
        return tokenize(found, tokenizer, **decides, **rows.rendered)

    def build() -> Iterator[token_cache.Batch]:
        return token_cache.map_ahead(tokenize_batch, files.read_batches(path, *rows.how))

    return token_cache.load_or_build(Path(data_args.data_cache_dir or token_cache.default_cache_dir()), key, build)


# --------------------------------------------------------------------------------------------------------- dataset


class SupervisedDataset(Dataset):
    """Examples over memory-mapped tokens.

    [i] -> {"input_ids": (tokens,) int64, "labels": (tokens,) int64, what is read masked with IGNORE_INDEX}

    Args:
        parts: tokenized files, each with those of its rows that are examples.
        train_on_prompt: train on what is read too.
    """

    def __init__(self, parts: list[mixture.Part], train_on_prompt: bool = False):
        def of_examples(name: str) -> np.ndarray:
            return np.concatenate([getattr(part.rows, name)[part.kept] for part in parts])

        self.parts, self.train_on_prompt = parts, train_on_prompt
        self.part_of = np.repeat(np.arange(len(parts)), [len(part.kept) for part in parts])
        self.offsets = of_examples("offsets")
        self.lengths = of_examples("lengths")  # (examples,) int32, tokens
        self.prompt_lengths = of_examples("prompt_lengths")  # (examples,) int32, tokens before the first answer
        self.row_numbers = of_examples("row_numbers")  # (examples,) as a spreadsheet shows them
        trained = self.lengths - 1 if train_on_prompt else of_examples("trained")
        tokens = {"tokens": int(self.lengths.sum(dtype=np.int64)), "trained_tokens": int(trained.sum(dtype=np.int64))}
        self.counts = mixture.counts(parts) | {"kept": len(self), **tokens}

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        rows, start, length = self.parts[self.part_of[index]].rows, self.offsets[index], self.lengths[index]
        input_ids = torch.from_numpy(rows.tokens[start : start + length].astype(np.int64))
        labels = input_ids.clone()
        labels[: 1 if self.train_on_prompt else self.prompt_lengths[index]] = IGNORE_INDEX
        if len(rows.switches) and not self.train_on_prompt:
            for stop, begin in self.switches(index).reshape(-1, 2).tolist():
                labels[stop:begin] = IGNORE_INDEX
        return {"input_ids": input_ids, "labels": labels}

    def switches(self, index: int) -> np.ndarray:
        """Where, after its first answer, an example's training stops and begins again."""
        switches, start = self.parts[self.part_of[index]].rows.switches, self.offsets[index]
        return switches[slice(*np.searchsorted(switches, [start, start + self.lengths[index]]))] - start

    def first_answer(self, index: int) -> tuple[int, int]:
        """Where an example's first answer begins and ends."""
        return int(self.prompt_lengths[index]), int([*self.switches(index), self.lengths[index]][0])

    def where(self, index: int) -> str:
        """The row that an example is, with its file if there are several: "row 7", "b.csv, row 7"."""
        path = f"{self.parts[self.part_of[index]].path}, " if len(self.parts) > 1 else ""
        return f"{path}row {self.row_numbers[index]}"


@dataclass
class DataCollatorForSupervisedDataset:
    """Pad a batch on the right, by length and never by the pad id, which may stand for EOS as well.

    input_ids [[1,2,3],[4,5]], pad 0 -> input_ids [[1,2,3],[4,5,0]], attention_mask [[1,1,1],[1,1,0]]
    labels [[-100,2,3],[-100,5]]     -> labels [[-100,2,3],[-100,5,-100]]
    """

    tokenizer: PreTrainedTokenizerBase

    def __call__(self, examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        if not examples:  # this rank has none left in the last step, and still runs with the others: nothing is trained
            examples = [{"input_ids": torch.zeros(1, dtype=torch.int64), "labels": torch.full((1,), IGNORE_INDEX)}]
        input_ids, labels = ([example[name] for example in examples] for name in ("input_ids", "labels"))
        lengths = torch.tensor([len(ids) for ids in input_ids])
        return {
            "input_ids": pad_sequence(input_ids, batch_first=True, padding_value=self.tokenizer.pad_token_id),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
            "attention_mask": (torch.arange(lengths.max()) < lengths[:, None]).long(),
        }


def tokenize_files(paths, use: str, tokenizer, data_args: DataArguments, args: TrainingArguments) -> list[mixture.Part]:
    """Tokenize each file, say what became of its rows, and take as many of them as FILE*3 or FILE*0.5 asks for."""
    parts = []
    for file in map(files.DataFile.of, paths or ()):
        rows = tokenize_file(file.path, tokenizer, data_args, args.model_max_length)
        parts.append(mixture.Part.of(file, rows))
        became = audit.describe_part(parts[-1])
        if not len(parts[-1].kept):
            raise job.UserError(f"{became}. Nothing is left to {use}: {parts[-1].cures()}.")
        job.say(became)
        for finding in audit.repeats(parts[-1:], tokenizer, data_args.allow_control_tokens):
            job.say(f"warning: {file.path}: {finding}")
    return parts


def make_supervised_data_module(tokenizer, data_args: DataArguments, training_args: TrainingArguments) -> dict:
    """Make the Trainer's train_dataset, eval_dataset (or None) and data_collator, and say what became of the rows."""
    trains, evaluates = data_args.data_path, data_args.eval_data_path
    train_parts, eval_parts = (
        tokenize_files(paths, use, tokenizer, data_args, training_args)
        for paths, use in ((trains if trains != evaluates else None, "train on"), (evaluates, "evaluate"))
    )
    train_parts = train_parts or eval_parts  # --do_train False names the evaluation's files twice
    if data_args.eval_split:
        train_parts, eval_parts = mixture.hold_out(train_parts, data_args.eval_split)
    elif eval_parts and training_args.do_train and job.rank() == 0:
        for leak in audit.leaks(train_parts, eval_parts):
            job.say(f"warning: {leak}")
    whole = data_args.train_on_prompt
    train_dataset = SupervisedDataset([part.repeated() for part in train_parts], whole)
    eval_dataset = SupervisedDataset(eval_parts, whole) if eval_parts else None
    if not training_args.do_train:
        train_dataset = eval_dataset
    job.say(audit.describe_datasets(train_dataset if training_args.do_train else None, eval_dataset))
    job.say(audit.describe_example(tokenizer, train_dataset, 0, colour=sys.stdout.isatty()), coloured=True)
    collator = DataCollatorForSupervisedDataset(tokenizer)
    return {"train_dataset": train_dataset, "eval_dataset": eval_dataset, "data_collator": collator}


def check_data(tokenizer, data_args: DataArguments, args: TrainingArguments, config: PreTrainedConfig) -> int:
    """Audit the data in place of training; the exit code, 1 when a run would be useless."""
    train_parts, eval_parts = (
        [
            mixture.Part.of(file, tokenize_file(file.path, tokenizer, data_args, args.model_max_length))
            for file in listed
        ]
        for listed in (map(files.DataFile.of, paths or ()) for paths in (data_args.data_path, data_args.eval_data_path))
    )
    if data_args.eval_split:
        mixture.hold_out(train_parts, data_args.eval_split)  # which tells of a share far from this one
    dataset = SupervisedDataset([part.repeated() for part in train_parts], data_args.train_on_prompt)
    return audit.check_data(tokenizer, data_args, args, config, dataset, eval_parts)


# ------------------------------------------------------------------------------------------------------------ model


def load_model(
    model_args: ModelArguments, args: TrainingArguments, tokenizer: PreTrainedTokenizerBase, settled: settle.Settled
) -> PreTrainedModel:
    """Load the weights in float32, whatever type the checkpoint stores, and add LoRA's where asked (frozen weights: sft/model/lora.py).

    transformers 5 would keep the stored type, and at a learning rate of 2e-5 most updates of a bfloat16 weight round
    to nothing. bfloat16 is the type of the computation instead: autocast, FSDP or DeepSpeed see to that.
    """
    options = lora.load_options(model_args, args) if model_args.use_lora else {"dtype": torch.float32}
    implementation = settled.attention.value
    model = loading.load_weights(model_args, args, settled.config, attn_implementation=implementation, **options)
    model.config.use_cache = False
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    loading.make_generation_config_valid(model)
    return lora.add_adapters(model, model_args, args) if model_args.use_lora else model


# ------------------------------------------------------------------------------------------------------------ train

LoadTokenizer = Callable[[ModelArguments], PreTrainedTokenizerBase]


def fit(run: prepare.Run, tokenizer, data_module: dict[str, Any], resume: str | None):
    """Settle what a run does, load the model and train it.

    Returns: the trainer; None where only the whole model, before the first step, turned out not to be computed right in packed
    rows. The run is a padded one then.
    """
    model_args, args = run.model_args, run.args
    settled = settle.settle(model_args, args, data_module["train_dataset"])
    run.refuse_changes(settled, data_module)
    set_seed(args.seed)
    with run.phase("load"):
        model = load_model(model_args, args, tokenizer, settled)
        head = settle.prepare_step(model, settled)
        settled = settle.rehearse_fullest(model, head, settled, args, data_module["train_dataset"].lengths)
        trainer = run.build_trainer(model, head, settled, tokenizer, data_module)
    try:
        with run.training(trainer, settled):
            trainer.train(resume_from_checkpoint=resume) if args.do_train else run.evaluate(trainer)
    except prepare.NotPacked:
        trainer.accelerator.free_memory()
        return None
    return trainer


def train(load_tokenizer: LoadTokenizer, argv: list[str] | None = None) -> prepare.SupervisedTrainer:
    """Everything, in the order in which it happens. What can be known before weights load is refused before they do."""
    model_args, data_args, args = parse(argv, prepare.CHECKS)
    run = prepare.Run(model_args, data_args, args)
    with run.phase("data"), job.all_ranks_or_none():
        tokenizer = run.read_tokenizer(load_tokenizer)
        if data_args.check_data:
            raise SystemExit(check_data(tokenizer, data_args, args, loading.load_config(model_args)))
        data_module = make_supervised_data_module(tokenizer, data_args, args)
    resume = run.resume_from(data_module)
    trainer = fit(run, tokenizer, data_module, resume)
    if trainer is None:
        gc.collect()  # the packed model
        trainer = fit(run, tokenizer, data_module, resume)
    run.finish(trainer)
    return trainer

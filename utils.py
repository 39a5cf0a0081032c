"""The path of a training run, in the order that it happens.

CSV -> template -> tokens and labels -> dataset -> collator -> model -> trainer -> saved model
"""

import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from sft import cache
from sft.arguments import DataArguments, TrainingArguments, UserError, say
from sft.rows import header_problems, printable, read_csv
from sft.tokenizers import compare_with_sentencepiece, encode_prompts, encode_responses

IGNORE_INDEX = -100

# ------------------------------------------------------------------------------------------------------------- CSV

ROWS_PER_BATCH, CHARACTERS_PER_BATCH = 1024, 2**22  # one call of the tokenizer: enough for all cores, bounded in memory


def read_batches(data_path: str, data_args: DataArguments) -> Iterator[list[tuple[str, str]]]:
    """Read the CSV in batches of (source cell, target cell), with a progress bar over its bytes."""
    with tqdm(total=os.path.getsize(data_path), unit="B", unit_scale=True, desc=f"tokenizing {data_path}") as bar:
        batch, characters = [], 0
        for _, source, target in read_csv(data_path, data_args.source, data_args.target, lambda at: bar.update(at - bar.n)):
            batch.append((source, target))
            characters += len(source) + len(target)
            if len(batch) == ROWS_PER_BATCH or characters > CHARACTERS_PER_BATCH:
                yield batch
                batch, characters = [], 0
        yield batch


# -------------------------------------------------------------------------------------------------------- template

ALPACA_TEMPLATE = (  # stanford_alpaca, train.py, PROMPT_DICT["prompt_no_input"]
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


def load_template(prompt_template: str) -> str:
    """Return the prompt's text with one {instruction} in it, for 'none', 'alpaca' or the path of a text file."""
    if prompt_template in ("none", "alpaca"):
        return "{instruction}" if prompt_template == "none" else ALPACA_TEMPLATE
    try:
        template = Path(prompt_template).read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise UserError(f"--prompt_template {prompt_template}: {reason}. Give 'none', 'alpaca', or a text file.") from None
    if template.count("{instruction}") != 1:
        raise UserError(
            f"--prompt_template {prompt_template}: {{instruction}} stands in it {template.count('{instruction}')} times. "
            "Write it once, where the source column's text belongs."
        )
    return template


# ----------------------------------------------------------------------------------------------- tokens and labels


def tokenize(
    batch: list[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, template: str, data_args: DataArguments, max_length: int
) -> cache.Batch:
    """Encode prompts, and responses as their continuation; drop rows without text or room, cut rows that are too long.

        input_ids  prompt, response, EOS
        labels     IGNORE_INDEX over the prompt; response, EOS

    Labels follow from the prompt's length, which is kept in their place. A cut row has lost its EOS: it does not end there.
    """
    outcomes = np.full(len(batch), cache.EMPTY, np.uint8)
    filled = [index for index, (source, target) in enumerate(batch) if source.strip() and target.strip()]
    sources = [template.replace("{instruction}", batch[index][0]) for index in filled]
    targets = [batch[index][1] for index in filled]
    prompts = encode_prompts(tokenizer, sources, allow_control_tokens=data_args.allow_control_tokens)
    responses = encode_responses(tokenizer, targets, allow_control_tokens=data_args.allow_control_tokens)
    tokens: list[int] = []
    lengths, prompt_lengths = [], []
    for index, prompt_ids, response_ids in zip(filled, prompts, responses, strict=True):
        room = max_length - len(prompt_ids)
        if room < 1:
            outcomes[index] = cache.NO_ROOM
            continue
        trained_ids = [*response_ids, tokenizer.eos_token_id]
        outcomes[index] = cache.KEPT if len(trained_ids) <= room else cache.CUT
        trained_ids = trained_ids[:room]
        tokens += prompt_ids
        tokens += trained_ids
        lengths.append(len(prompt_ids) + len(trained_ids))
        prompt_lengths.append(len(prompt_ids))
    return cache.Batch(np.array(tokens, np.int32), np.array(lengths, np.int32), np.array(prompt_lengths, np.int32), outcomes)


def tokenize_csv(
    data_path: str, tokenizer: PreTrainedTokenizerBase, data_args: DataArguments, max_length: int
) -> cache.TokenizedRows:
    """Tokenize a CSV once for each machine, or open what an earlier run left.

    Raises:
        UserError: every fault of the CSV, or no row that can be trained on.
    """
    template = load_template(data_args.prompt_template)
    sentencepiece_model = getattr(tokenizer, "sentencepiece_model", None)

    def build() -> Iterator[cache.Batch]:
        batches = read_batches(data_path, data_args)
        if sentencepiece_model:
            first = next(batches)
            prompts = [template.replace("{instruction}", source) for source, _ in first]
            compare_with_sentencepiece(tokenizer, prompts + [target for _, target in first])
            batches = chain([first], batches)
        # A fast tokenizer uses all cores by itself and lets go of the interpreter meanwhile: one thread keeps it busy while
        # this one reads and writes. A tokenizer written in Python needs processes.
        cores = len(os.sched_getaffinity(0))
        workers = ThreadPoolExecutor(1) if tokenizer.is_fast else ProcessPoolExecutor(cores, get_context("fork"))
        encode = partial(tokenize, tokenizer=tokenizer, template=template, data_args=data_args, max_length=max_length)
        with workers:
            yield from cache.map_ahead(lambda batch: workers.submit(encode, batch), batches, ahead=2 * cores)

    key = {
        "version": cache.VERSION,
        "csv": cache.file_digest(data_path),
        "columns": [data_args.source, data_args.target],
        "template": template,
        "allow_control_tokens": data_args.allow_control_tokens,
        "tokenizer": cache.tokenizer_digest(tokenizer),
        "sentencepiece_model": sentencepiece_model and cache.file_digest(sentencepiece_model),
        "model_max_length": max_length,
        "libraries": [transformers.__version__, tokenizers.__version__],
    }
    rows = cache.load_or_build(Path(data_args.data_cache_dir or cache.default_cache_dir()), key, build)
    if not len(rows.lengths):
        counts = rows.counts()
        raise UserError(
            f"{data_path}: none of its {counts['rows_read']:,} rows can be trained on: {counts['rows_empty']:,} with an empty "
            f"prompt or response, {counts['rows_no_room']:,} whose prompt leaves no room in --model_max_length {max_length}."
        )
    return rows


# --------------------------------------------------------------------------------------------------------- dataset


class SupervisedDataset(Dataset):
    """Examples over memory-mapped tokens.

    [i] -> {"input_ids": (tokens,) int64, "labels": (tokens,) int64, the prompt's masked with IGNORE_INDEX}

    Args:
        rows: a tokenized CSV.
        kept: which of its kept rows, as positions among them; all when None.
    """

    def __init__(self, rows: cache.TokenizedRows, kept: np.ndarray | None = None):
        kept = np.arange(len(rows.lengths)) if kept is None else kept
        self.rows = rows
        self.offsets = rows.offsets[kept]
        self.lengths = rows.lengths[kept]  # (examples,) int32, tokens
        self.prompt_lengths = rows.prompt_lengths[kept]  # (examples,) int32, tokens
        self.row_numbers = rows.row_numbers[kept]  # (examples,) as a spreadsheet shows them: the header is row 1
        tokens, prompt_tokens = int(self.lengths.sum(dtype=np.int64)), int(self.prompt_lengths.sum(dtype=np.int64))
        self.counts = rows.counts() | {"kept": len(kept), "tokens": tokens, "trained_tokens": tokens - prompt_tokens}

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        start = self.offsets[index]
        input_ids = torch.from_numpy(self.rows.tokens[start : start + self.lengths[index]].astype(np.int64))
        labels = input_ids.clone()
        labels[: self.prompt_lengths[index]] = IGNORE_INDEX
        return {"input_ids": input_ids, "labels": labels}


@dataclass
class DataCollatorForSupervisedDataset:
    """Pad a batch on the right, by length and never by the pad id, which may stand for EOS as well.

    input_ids [[1,2,3],[4,5]], pad 0 -> input_ids [[1,2,3],[4,5,0]], attention_mask [[1,1,1],[1,1,0]]
    labels [[-100,2,3],[-100,5]]     -> labels [[-100,2,3],[-100,5,-100]]
    """

    tokenizer: PreTrainedTokenizerBase

    def __call__(self, examples: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        sequences = [example["input_ids"] for example in examples]
        lengths = torch.tensor([len(sequence) for sequence in sequences])
        return {
            "input_ids": pad_sequence(sequences, batch_first=True, padding_value=self.tokenizer.pad_token_id),
            "labels": pad_sequence([example["labels"] for example in examples], batch_first=True, padding_value=IGNORE_INDEX),
            "attention_mask": (torch.arange(lengths.max()) < lengths[:, None]).long(),
        }


EVAL_SPLIT_SEED = 0  # the training seed does not decide which rows are held out


def data_problems(data_args: DataArguments) -> list[str]:
    """What can be said of the data before a row is tokenized: template, files, columns."""
    problems = []
    try:
        load_template(data_args.prompt_template)
    except UserError as error:
        problems += error.problems
    if data_args.eval_data_path and data_args.eval_split:
        problems.append("--eval_data_path and --eval_split both name the evaluation data. Give one of them.")
    for path in filter(None, (data_args.data_path, data_args.eval_data_path)):
        problems += header_problems(path, data_args.source, data_args.target)
    return problems


def make_supervised_data_module(
    tokenizer: PreTrainedTokenizerBase, data_args: DataArguments, training_args: TrainingArguments
) -> dict:
    """Make the Trainer's train_dataset, eval_dataset (or None) and data_collator, and say what became of the rows."""
    if problems := data_problems(data_args):
        raise UserError(problems)
    rows = tokenize_csv(data_args.data_path, tokenizer, data_args, training_args.model_max_length)
    train_dataset, eval_dataset = SupervisedDataset(rows), None
    if data_args.eval_data_path:
        eval_rows = tokenize_csv(data_args.eval_data_path, tokenizer, data_args, training_args.model_max_length)
        eval_dataset = SupervisedDataset(eval_rows)
    elif data_args.eval_split:
        order = np.random.default_rng(EVAL_SPLIT_SEED).permutation(len(train_dataset))
        held_out = max(1, round(len(order) * data_args.eval_split))
        if held_out == len(order):
            raise UserError(f"{data_args.data_path}: --eval_split {data_args.eval_split} of {len(order)} rows leaves none to train on.")
        train_dataset, eval_dataset = (SupervisedDataset(rows, np.sort(part)) for part in (order[held_out:], order[:held_out]))
    say(describe_rows(data_args.data_path, train_dataset))
    if eval_dataset:
        say(describe_rows(data_args.eval_data_path or f"--eval_split {data_args.eval_split}", eval_dataset))
    say(describe_example(tokenizer, train_dataset, 0, colour=sys.stdout.isatty()))
    collator = DataCollatorForSupervisedDataset(tokenizer)
    return {"train_dataset": train_dataset, "eval_dataset": eval_dataset, "data_collator": collator}


def describe_rows(name: str, dataset: SupervisedDataset) -> str:
    """Two lines: what became of the rows, and how long the examples are."""
    counts, lengths = dataset.counts, dataset.lengths
    middle, high = np.percentile(lengths, (50, 99))
    return (
        f"{name}: {counts['rows_read']:,} rows read, {counts['rows_empty']:,} dropped as empty, {counts['rows_no_room']:,} dropped "
        f"because the prompt leaves no room, {counts['rows_cut']:,} cut (they lost their EOS); {counts['kept']:,} examples\n"
        f"tokens: {counts['tokens']:,}, of which {counts['trained_tokens']:,} trained "
        f"({counts['trained_tokens'] / counts['tokens']:.0%}); per example mean {lengths.mean():.0f}, median {middle:.0f}, "
        f"99 % {high:.0f}, longest {lengths.max()}"
    )


def describe_example(tokenizer: PreTrainedTokenizerBase, dataset: SupervisedDataset, index: int, colour: bool) -> str:
    """One example as the model sees it, its trained tokens green on a terminal and in [...] elsewhere."""
    ids = dataset[index]["input_ids"].tolist()
    whole, prompt = tokenizer.decode(ids), tokenizer.decode(ids[: dataset.prompt_lengths[index]])
    prompt = prompt if whole.startswith(prompt) else os.path.commonprefix([whole, prompt])  # a cleaned-up or split character
    before, after = ("\033[32m", "\033[0m") if colour else ("[", "]")
    row = dataset.row_numbers[index]
    return f"row {row}, trained tokens marked:\n{printable(prompt)}{before}{printable(whole[len(prompt):])}{after}"

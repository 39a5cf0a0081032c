"""The path of a training run, in the order that it happens.

file -> template -> tokens and labels -> dataset -> collator -> model -> trainer -> saved model
"""

import sys
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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
from sft.data import audit, csv_rows, encode, token_cache
from sft.data.template import load_template
from sft.flags import DataArguments, ModelArguments, TrainingArguments, parse
from sft.model import loading, lora
from sft.plan import settle
from sft.run import prepare

# ----------------------------------------------------------------------------------------------- tokens and labels


def tokenize(batch, tokenizer, template: str, allow_control_tokens: bool, max_length: int) -> token_cache.Batch:
    """Encode prompts, and responses as their continuation; drop rows without text or room, cut rows that are too long.

        input_ids  prompt, response, EOS
        labels     IGNORE_INDEX over the prompt; response, EOS

    Labels follow from the prompt's length, which is kept in their place. A cut row loses its EOS: it does not end there.
    """
    outcomes = np.full(len(batch), token_cache.EMPTY, np.uint8)
    filled = [index for index, (source, target) in enumerate(batch) if source.strip() and target.strip()]
    texts = [template.replace("{instruction}", batch[index][0]) for index in filled]
    prompts = encode.encode_prompts(tokenizer, texts, allow_control_tokens=allow_control_tokens)
    texts = [batch[index][1] for index in filled]
    responses = encode.encode_responses(tokenizer, texts, allow_control_tokens=allow_control_tokens)
    tokens, lengths, prompt_lengths = (array("i") for _ in range(3))
    for index, prompt_ids, response_ids in zip(filled, prompts, responses, strict=True):
        room = max_length - len(prompt_ids)
        if room < 1:
            outcomes[index] = token_cache.NO_ROOM
            continue
        response_ids.append(tokenizer.eos_token_id)
        outcomes[index] = token_cache.KEPT if len(response_ids) <= room else token_cache.CUT
        trained_ids = response_ids[:room]
        tokens += prompt_ids + trained_ids
        lengths.append(len(prompt_ids) + len(trained_ids))
        prompt_lengths.append(len(prompt_ids))
    return token_cache.Batch(np.array(tokens), np.array(lengths), np.array(prompt_lengths), outcomes)


def tokenize_csv(path: str, tokenizer, data_args: DataArguments, max_length: int) -> token_cache.TokenizedRows:
    """Tokenize a CSV once for each machine, or open what an earlier run left."""
    template = load_template(data_args.prompt_template)
    reference = getattr(tokenizer, "reference", None)  # what its ids must equal
    decides: dict[str, Any] = {
        "template": template,
        "max_length": max_length,
        "allow_control_tokens": data_args.allow_control_tokens,
    }
    key = {
        **decides,
        "version": token_cache.VERSION,
        "csv": token_cache.file_digest(path),
        "columns": [data_args.source, data_args.target],
        "tokenizer": token_cache.tokenizer_digest(tokenizer),
        "reference": reference and token_cache.file_digest(reference.file),
        "libraries": [transformers.__version__, tokenizers.__version__],
    }

    def tokenize_batch(numbered_batch: tuple[int, list[tuple[str, str]]]) -> token_cache.Batch:
        number, batch = numbered_batch
        if reference and number * csv_rows.ROWS_PER_BATCH < reference.rows:
            prompts = [template.replace("{instruction}", source) for source, _ in batch]
            encode.compare_with_reference(tokenizer, prompts + [target for _, target in batch])
        return tokenize(batch, tokenizer, **decides)

    def build() -> Iterator[token_cache.Batch]:
        return token_cache.map_ahead(
            tokenize_batch, enumerate(csv_rows.read_batches(path, data_args.source, data_args.target))
        )

    return token_cache.load_or_build(Path(data_args.data_cache_dir or token_cache.default_cache_dir()), key, build)


# --------------------------------------------------------------------------------------------------------- dataset


class SupervisedDataset(Dataset):
    """Examples over memory-mapped tokens.

    [i] -> {"input_ids": (tokens,) int64, "labels": (tokens,) int64, the prompt's masked with IGNORE_INDEX}

    Args:
        rows: a tokenized CSV.
        kept: which of its kept rows, as positions among them; all when None.
    """

    def __init__(self, rows: token_cache.TokenizedRows, kept: np.ndarray | None = None):
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
        if not examples:  # this rank has none left in the last step, and still runs with the others: nothing is trained
            examples = [{"input_ids": torch.zeros(1, dtype=torch.int64), "labels": torch.full((1,), IGNORE_INDEX)}]
        input_ids, labels = ([example[name] for example in examples] for name in ("input_ids", "labels"))
        lengths = torch.tensor([len(ids) for ids in input_ids])
        return {
            "input_ids": pad_sequence(input_ids, batch_first=True, padding_value=self.tokenizer.pad_token_id),
            "labels": pad_sequence(labels, batch_first=True, padding_value=IGNORE_INDEX),
            "attention_mask": (torch.arange(lengths.max()) < lengths[:, None]).long(),
        }


def make_supervised_data_module(tokenizer, data_args: DataArguments, training_args: TrainingArguments) -> dict:
    """Make the Trainer's train_dataset, eval_dataset (or None) and data_collator, and say what became of the rows."""
    datasets = {}
    for path in dict.fromkeys(filter(None, (data_args.data_path, data_args.eval_data_path))):
        rows = tokenize_csv(path, tokenizer, data_args, training_args.model_max_length)
        became = audit.describe_rows(path, rows.counts())
        if not len(rows.lengths):
            use = "train on" if path == data_args.data_path else "evaluate"
            raise job.UserError(f"{became}. Nothing is left to {use}: raise --model_max_length or mend the rows.")
        job.say(became)
        datasets[path] = SupervisedDataset(rows)
    train_dataset, eval_dataset = datasets[data_args.data_path], datasets.get(data_args.eval_data_path)
    if data_args.eval_split:
        rows = train_dataset.rows
        train_dataset, eval_dataset = (SupervisedDataset(rows, kept) for kept in rows.hold_out(data_args.eval_split))
    elif eval_dataset and training_args.do_train and job.rank() == 0:
        for leak in audit.leaks(train_dataset.rows, eval_dataset.rows):
            job.say(f"warning: {leak}")
    if not training_args.do_train:
        train_dataset = eval_dataset
    job.say(audit.describe_datasets(train_dataset if training_args.do_train else None, eval_dataset))
    job.say(audit.describe_example(tokenizer, train_dataset, 0, colour=sys.stdout.isatty()), coloured=True)
    collator = DataCollatorForSupervisedDataset(tokenizer)
    return {"train_dataset": train_dataset, "eval_dataset": eval_dataset, "data_collator": collator}


def check_data(tokenizer, data_args: DataArguments, args: TrainingArguments, config: PreTrainedConfig) -> int:
    """Audit the data in place of training; the exit code, 1 when a run would be useless."""
    paths = filter(None, (data_args.data_path, data_args.eval_data_path))
    datasets = (SupervisedDataset(tokenize_csv(path, tokenizer, data_args, args.model_max_length)) for path in paths)
    return audit.check_data(tokenizer, data_args, args, config, *datasets)


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


def train(load_tokenizer: LoadTokenizer, argv: list[str] | None = None) -> prepare.SupervisedTrainer:
    """Everything, in the order in which it happens. What can be known before weights load is refused before they do."""
    model_args, data_args, args = parse(argv, prepare.CHECKS)
    run = prepare.Run(model_args, data_args, args)
    with run.phase("data"), job.all_ranks_or_none():
        tokenizer = load_tokenizer(model_args)
        if data_args.check_data:
            raise SystemExit(check_data(tokenizer, data_args, args, loading.load_config(model_args)))
        data_module = make_supervised_data_module(tokenizer, data_args, args)
    resume = run.resume_from(data_module)
    settled = settle.settle(model_args, args, data_module["train_dataset"])
    run.refuse_changes(settled, data_module)
    set_seed(args.seed)
    with run.phase("load"):
        model = load_model(model_args, args, tokenizer, settled)
        head = settle.prepare_step(model, settled)
        trainer = run.build_trainer(model, head, settled, tokenizer, data_module)
    with run.training(trainer, settled):
        trainer.train(resume_from_checkpoint=resume) if args.do_train else run.evaluate(trainer)
    run.finish(trainer)
    return trainer

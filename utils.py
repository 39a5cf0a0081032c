"""The path of a training run, in the order that it happens.

CSV -> template -> tokens and labels -> dataset -> collator -> model -> trainer -> saved model
"""

import gc
import sys
from array import array
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from sft import job
from sft.arithmetic import describe_plan, plan, precision
from sft.data import audit, token_cache
from sft.data.csv_rows import ROWS_PER_BATCH, header_problems, read_batches, read_csv
from sft.data.encode import check_vocabulary, encode_prompts, encode_responses
from sft.data.held_out import hold_out
from sft.data.llama_tokenizer import compare_with_sentencepiece
from sft.data.template import load_template
from sft.flags import DataArguments, ModelArguments, TrainingArguments, parse
from sft.job import UserError, all_ranks_or_none, rank, say
from sft.model import loading, lora, safe_loads
from sft.plan import memory_ladder
from sft.plan.deepspeed_file import check_deepspeed, read_for_plan
from sft.report.picture import draw
from sft.report.progress import tracker_problems
from sft.report.record import Report
from sft.run import evaluation
from sft.run.trainer import SupervisedTrainer, choose_attention, export_model, plan_memory, prepare_saving, watch
from sft.saving import export
from sft.saving.model_card import write_card
from sft.saving.resume import choose_checkpoint, output_dir_problems

IGNORE_INDEX = -100

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
    prompts = encode_prompts(tokenizer, texts, allow_control_tokens=allow_control_tokens)
    texts = [batch[index][1] for index in filled]
    responses = encode_responses(tokenizer, texts, allow_control_tokens=allow_control_tokens)
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


ROWS_COMPARED = 1000  # with SentencePiece, where the model has its tokenizer.model


def tokenize_csv(path: str, tokenizer, data_args: DataArguments, max_length: int) -> token_cache.TokenizedRows:
    """Tokenize a CSV once for each machine, or open what an earlier run left."""
    template = load_template(data_args.prompt_template)
    sentencepiece_model = getattr(tokenizer, "sentencepiece_model", None)
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
        "sentencepiece_model": sentencepiece_model and token_cache.file_digest(sentencepiece_model),
        "libraries": [transformers.__version__, tokenizers.__version__],
    }

    def tokenize_batch(numbered_batch: tuple[int, list[tuple[str, str]]]) -> token_cache.Batch:
        number, batch = numbered_batch
        if sentencepiece_model and number * ROWS_PER_BATCH < ROWS_COMPARED:
            prompts = [template.replace("{instruction}", source) for source, _ in batch]
            compare_with_sentencepiece(tokenizer, prompts + [target for _, target in batch])
        return tokenize(batch, tokenizer, **decides)

    def build() -> Iterator[token_cache.Batch]:
        return token_cache.map_ahead(tokenize_batch, enumerate(read_batches(path, data_args.source, data_args.target)))

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


def data_problems(data_args: DataArguments) -> list[str]:
    """What can be said of the data before a row is tokenized: template, files, columns."""
    problems = []
    try:
        load_template(data_args.prompt_template)
    except UserError as error:
        problems += error.problems
    if data_args.eval_data_path and data_args.eval_split:
        problems.append("--eval_data_path and --eval_split both name the evaluation data. Give one of them.")
    if not 0 <= data_args.eval_split < 1:
        problems.append(f"--eval_split {data_args.eval_split:g}: give a share from 0 up to 1, such as 0.02.")
    for path in filter(None, (data_args.data_path, data_args.eval_data_path)):
        problems += header_problems(path, data_args.source, data_args.target)
    return problems


def make_supervised_data_module(tokenizer, data_args: DataArguments, training_args: TrainingArguments) -> dict:
    """Make the Trainer's train_dataset, eval_dataset (or None) and data_collator, and say what became of the rows."""
    datasets = {}
    for path in filter(None, (data_args.data_path, data_args.eval_data_path)):
        rows = tokenize_csv(path, tokenizer, data_args, training_args.model_max_length)
        became = audit.describe_rows(path, rows.counts())
        if not len(rows.lengths):
            use = "train on" if path == data_args.data_path else "evaluate"
            raise UserError(f"{became}. Nothing is left to {use}: raise --model_max_length or mend the rows.")
        say(became)
        datasets[path] = SupervisedDataset(rows)
    train_dataset, eval_dataset = datasets[data_args.data_path], datasets.get(data_args.eval_data_path)
    if data_args.eval_split:
        rows = train_dataset.rows
        train_dataset, eval_dataset = (SupervisedDataset(rows, kept) for kept in hold_out(rows, data_args.eval_split))
    elif eval_dataset and rank() == 0:
        for leak in audit.leaks(train_dataset.rows, eval_dataset.rows):
            say(f"warning: {leak}")
    say(audit.describe_datasets(train_dataset, eval_dataset))
    say(audit.describe_example(tokenizer, train_dataset, 0, colour=sys.stdout.isatty()))
    collator = DataCollatorForSupervisedDataset(tokenizer)
    return {"train_dataset": train_dataset, "eval_dataset": eval_dataset, "data_collator": collator}


def check_data(tokenizer, data_args: DataArguments, training_args: TrainingArguments, vocabulary_size: int) -> int:
    """Audit the training data in place of training; the exit code, 1 when a run would be useless."""
    dataset, *evaluation = (
        SupervisedDataset(tokenize_csv(path, tokenizer, data_args, training_args.model_max_length))
        for path in filter(None, (data_args.data_path, data_args.eval_data_path))
    )
    if rank() != 0:
        return 0
    path, template = data_args.data_path, load_template(data_args.prompt_template)
    cells, encode = read_csv(path, data_args.source, data_args.target), partial(encode_responses, tokenizer)
    gc.freeze()  # else all that was imported is searched for garbage while the texts come and go: 0.25 s
    try:
        return audit.audit(
            dataset, cells, template, tokenizer, encode, path, training_args, vocabulary_size, *evaluation
        )
    finally:
        gc.unfreeze()


# ------------------------------------------------------------------------------------------------------------ model


def check_model(flags) -> list[str]:
    """What is wrong with the model and with what the flags would do to it, known from its config alone."""
    problems, config = loading.model_problems(flags)
    return problems + (lora.target_problems(config, flags.lora_target_modules) if config else [])


def plan_only(flags) -> list[str]:
    """With --plan_only say the memory plan and end the run, or return what keeps it from being made; else nothing."""
    return (read_for_plan(flags) or memory_ladder.stop_after_plan(flags)) if flags.plan_only else []


def load_model(
    model_args: ModelArguments, training_args: TrainingArguments, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """Load the weights in float32, whatever type the checkpoint stores (frozen weights: sft/model/lora.py).

    transformers 5 would keep the stored type, and at a learning rate of 2e-5 most updates of a bfloat16 weight round
    to nothing. bfloat16 is the type of the computation instead: autocast, FSDP or DeepSpeed see to that.
    """

    def load() -> PreTrainedModel:
        with safe_loads.safe_loads(model_args.model_name_or_path, deepspeed=False):
            return AutoModelForCausalLM.from_pretrained(
                model_args.model_name_or_path,
                cache_dir=model_args.cache_dir,
                trust_remote_code=model_args.trust_remote_code,
                attn_implementation=model_args.attn_implementation,
                **(lora.load_options(model_args, training_args) if model_args.use_lora else {"dtype": torch.float32}),
            )

    model = loading.load_on_rank_0(load) if loading.is_handed_out(model_args, training_args) else load()
    model.config.use_cache = False
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    loading.make_generation_config_valid(model)
    return lora.add_adapters(model, model_args, training_args) if model_args.use_lora else model


def check_ids(tokenizer: PreTrainedTokenizerBase, data_module: dict, config) -> None:
    """Refuse a tokenizer that is not the model's, and rows with an id that has no embedding."""
    problems = check_vocabulary(tokenizer, config)
    datasets = [dataset for dataset in (data_module["train_dataset"], data_module["eval_dataset"]) if dataset]
    largest = max(dataset.counts["largest_id"] for dataset in datasets)
    if largest >= config.vocab_size:
        problems.append(
            f"the data holds token id {largest} ({tokenizer.convert_ids_to_tokens(largest)!r}), and the model's embedding "
            f"ends at {config.vocab_size - 1}. The tokenizer in the model's folder is another model's."
        )
    if problems:
        raise UserError(problems)


# ------------------------------------------------------------------------------------------------------------ train

LoadTokenizer = Callable[[ModelArguments, TrainingArguments], PreTrainedTokenizerBase]


def keep_other_ranks_quiet() -> None:
    """transformers' warnings come from rank 0 alone, and its progress bars go to a terminal only."""
    if rank() != 0:
        transformers.utils.logging.set_verbosity_error()
    if rank() != 0 or not sys.stderr.isatty():
        transformers.utils.logging.disable_progress_bar()


def end_together(trainer: SupervisedTrainer) -> None:
    """A rank that leaves while another still merges or writes aborts now and then (gloo's threads, torch 2.13)."""
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


@job.new_store_for_each_attempt()
def train(load_tokenizer: LoadTokenizer, argv: list[str] | None = None) -> SupervisedTrainer:
    """Everything, in the order in which it happens. What can be known before weights load is refused before they do."""
    model_args, data_args, training_args = parse(
        argv,
        checks=(
            plan_only,
            data_problems,
            check_model,
            output_dir_problems,
            check_deepspeed,
            lora.lora_problems,
            evaluation.evaluation_problems,
            tracker_problems,
        ),
    )
    keep_other_ranks_quiet()
    loading.hold_deepspeed(training_args)
    if export.is_already_finished(training_args):
        raise SystemExit(0)
    report = Report(model_args, data_args, training_args, draw)
    with report.phase("load"), all_ranks_or_none():
        tokenizer = load_tokenizer(model_args, training_args)
    if data_args.check_data:
        raise SystemExit(check_data(tokenizer, data_args, training_args, loading.load_config(model_args).vocab_size))
    with report.phase("data"), all_ranks_or_none():
        data_module = make_supervised_data_module(tokenizer, data_args, training_args)
        check_ids(tokenizer, data_module, loading.load_config(model_args))
    resume = choose_checkpoint(training_args)
    say(describe_plan(model_args, training_args, len(data_module["train_dataset"])))
    attention_reason = choose_attention(model_args, training_args)
    memory_plan = plan_memory(model_args, training_args, data_module["train_dataset"].lengths)
    full = partial(memory_ladder.explain_out_of_memory, memory_plan)
    set_seed(training_args.seed)
    with report.phase("load"), full():
        loading.start_deepspeed(training_args)
        model = load_model(model_args, training_args, tokenizer)
        trainer = SupervisedTrainer(model=model, args=training_args, processing_class=tokenizer, **data_module)
    trainer.memory_plan = memory_plan
    watch(trainer, report)
    prepare_saving(trainer, model_args, data_args, resume)
    report.note_facts(
        trainer,
        template=load_template(data_args.prompt_template),
        batch=plan(training_args, len(data_module["train_dataset"])),
        precision=precision(model_args, training_args),
        attention_reason=attention_reason,
    )
    if memory_plan:
        report.note("memory_plan", **memory_plan.record())
    with report.phase("train"), full(), safe_loads.safe_loads(resume, trainer.is_deepspeed_enabled):
        trainer.train(resume_from_checkpoint=resume)
    if trainer.stops.stopped_early(trainer.state):
        report.finish(trainer.meter.summary())
        say(trainer.stops.farewell(trainer.state))
    else:
        proved = export_model(trainer, model_args, data_args)
        report.finish(trainer.meter.summary())
        if trainer.is_world_process_zero():
            write_card(Path(training_args.output_dir), training_args.hub_model_id)
            export.complete(training_args.output_dir, trainer.state.global_step, proved)
    end_together(trainer)
    return trainer

"""The path of a training run, in the order that it happens.

CSV -> template -> tokens and labels -> dataset -> collator -> model -> trainer -> saved model
"""

import sys
from array import array
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset
from transformers import (
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    set_seed,
)
from transformers.trainer_utils import EvalLoopOutput

from sft import (
    attention,
    audit,
    budget,
    cache,
    checkpoints,
    compiling,
    evaluation,
    export,
    fingerprint,
    lora,
    memory,
    packing,
    pretrained,
    restarts,
    safety,
)
from sft.arguments import (
    DataArguments,
    ModelArguments,
    TrainingArguments,
    UserError,
    all_ranks_or_none,
    parse,
    rank,
    say,
)
from sft.card import write_card
from sft.evaluation import AnswersCallback, EarlyStop, EvalBatchSampler, token_weighted_loop
from sft.live import ReportCallback, replace_progress, tracker_problems
from sft.loss import compile_loss, labelled_head, summed_loss
from sft.packing import PackedBatchSampler, PackedCollator
from sft.picture import draw
from sft.preflight import check_deepspeed
from sft.recipe import compute_dtype, describe_plan, export_dtype, plan, precision
from sft.record import Report
from sft.rehearsal import Rehearsal
from sft.rows import ROWS_PER_BATCH, header_problems, read_batches, read_csv
from sft.split import hold_out
from sft.stops import Stops
from sft.template import TEMPLATE_FILE, load_template
from sft.throughput import CountingCollator, Meter, ModelFlops, device_name, take_counts
from sft.tokenizers import check_vocabulary, compare_with_sentencepiece, encode_prompts, encode_responses

IGNORE_INDEX = -100

# ----------------------------------------------------------------------------------------------- tokens and labels


def tokenize(batch, tokenizer, template: str, allow_control_tokens: bool, max_length: int) -> cache.Batch:
    """Encode prompts, and responses as their continuation; drop rows without text or room, cut rows that are too long.

        input_ids  prompt, response, EOS
        labels     IGNORE_INDEX over the prompt; response, EOS

    Labels follow from the prompt's length, which is kept in their place. A cut row loses its EOS: it does not end there.
    """
    outcomes = np.full(len(batch), cache.EMPTY, np.uint8)
    filled = [index for index, (source, target) in enumerate(batch) if source.strip() and target.strip()]
    texts = [template.replace("{instruction}", batch[index][0]) for index in filled]
    prompts = encode_prompts(tokenizer, texts, allow_control_tokens=allow_control_tokens)
    texts = [batch[index][1] for index in filled]
    responses = encode_responses(tokenizer, texts, allow_control_tokens=allow_control_tokens)
    tokens, lengths, prompt_lengths = (array("i") for _ in range(3))
    for index, prompt_ids, response_ids in zip(filled, prompts, responses, strict=True):
        room = max_length - len(prompt_ids)
        if room < 1:
            outcomes[index] = cache.NO_ROOM
            continue
        trained_ids = [*response_ids, tokenizer.eos_token_id]
        outcomes[index] = cache.KEPT if len(trained_ids) <= room else cache.CUT
        trained_ids = trained_ids[:room]
        tokens.fromlist(prompt_ids)
        tokens.fromlist(trained_ids)
        lengths.append(len(prompt_ids) + len(trained_ids))
        prompt_lengths.append(len(prompt_ids))
    return cache.Batch(np.array(tokens), np.array(lengths), np.array(prompt_lengths), outcomes)


ROWS_COMPARED = 1000  # with SentencePiece, where the model has its tokenizer.model


def tokenize_csv(path: str, tokenizer, data_args: DataArguments, max_length: int) -> cache.TokenizedRows:
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
        "version": cache.VERSION,
        "csv": cache.file_digest(path),
        "columns": [data_args.source, data_args.target],
        "tokenizer": cache.tokenizer_digest(tokenizer),
        "sentencepiece_model": sentencepiece_model and cache.file_digest(sentencepiece_model),
        "libraries": [transformers.__version__, tokenizers.__version__],
    }

    def tokenize_batch(numbered_batch: tuple[int, list[tuple[str, str]]]) -> cache.Batch:
        number, batch = numbered_batch
        if sentencepiece_model and number * ROWS_PER_BATCH < ROWS_COMPARED:
            prompts = [template.replace("{instruction}", source) for source, _ in batch]
            compare_with_sentencepiece(tokenizer, prompts + [target for _, target in batch])
        return tokenize(batch, tokenizer, **decides)

    def build() -> Iterator[cache.Batch]:
        return cache.map_ahead(tokenize_batch, enumerate(read_batches(path, data_args.source, data_args.target)))

    return cache.load_or_build(Path(data_args.data_cache_dir or cache.default_cache_dir()), key, build)


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
    say(audit.describe_datasets(train_dataset, eval_dataset))
    say(audit.describe_example(tokenizer, train_dataset, 0, colour=sys.stdout.isatty()))
    collator = DataCollatorForSupervisedDataset(tokenizer)
    return {"train_dataset": train_dataset, "eval_dataset": eval_dataset, "data_collator": collator}


def check_data(tokenizer, data_args: DataArguments, training_args: TrainingArguments, vocabulary_size: int) -> int:
    """Audit the training data in place of training; the exit code, 1 when a run would be useless."""
    dataset = SupervisedDataset(tokenize_csv(data_args.data_path, tokenizer, data_args, training_args.model_max_length))
    if rank() != 0:
        return 0
    cells = read_csv(data_args.data_path, data_args.source, data_args.target)
    template, encode = load_template(data_args.prompt_template), partial(encode_responses, tokenizer)
    return audit.audit(dataset, cells, template, tokenizer, encode, data_args.data_path, training_args, vocabulary_size)


# ------------------------------------------------------------------------------------------------------------ model


def check_model(flags) -> list[str]:
    """What is wrong with the model and with what the flags would do to it, known from its config alone."""
    problems, config = pretrained.check(flags)
    return problems + (lora.target_problems(config, flags.lora_target_modules) if config else [])


def load_model(
    model_args: ModelArguments, training_args: TrainingArguments, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """Load the weights in float32, whatever type the checkpoint stores (frozen weights: sft/lora.py).

    transformers 5 would keep the stored type, and at a learning rate of 2e-5 most updates of a bfloat16 weight round
    to nothing. bfloat16 is the type of the computation instead: autocast, FSDP or DeepSpeed see to that.
    """
    model = AutoModelForCausalLM.from_pretrained(
        model_args.model_name_or_path,
        cache_dir=model_args.cache_dir,
        trust_remote_code=model_args.trust_remote_code,
        attn_implementation=model_args.attn_implementation,
        **(lora.load_options(model_args, training_args) if model_args.use_lora else {"dtype": torch.float32}),
    )
    model.config.use_cache = False
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    pretrained.make_generation_config_valid(model)
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


# ---------------------------------------------------------------------------------------------------------- Trainer


class SupervisedTrainer(Trainer):
    """The stock Trainer with packed micro-batches, an exact evaluation loss, counted tokens, and checkpoints that are whole."""

    data_collator: Callable[[list], dict]
    meter: Meter  # set by `watch`, like the report
    report: Report
    stops: Stops  # set by `prepare_saving`, like the fingerprint
    fingerprint: dict[str, str]
    memory_plan: memory.Plan | None = None
    packing_plan: packing.Plan | None = None
    sampler: PackedBatchSampler | None = None
    ahead: tuple[Any, Any] = (None, None)  # an epoch's iterator, and the next step's micro-batches from it
    before_writing: Callable[[dict], dict] | None = None  # sees, and may change, the weights about to be written

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.accumulation_asked = self.args.gradient_accumulation_steps
        if self.args.packing:
            self.data_collator = PackedCollator()
            self.head = labelled_head(self.model)

    def _get_train_sampler(self, train_dataset=None):
        if not self.args.packing and self.args.train_sampling_strategy != "random":
            return super()._get_train_sampler(train_dataset)
        if self.sampler is None:
            self.sampler = plan_micro_batches(self)
        return self.sampler

    def get_train_dataloader(self) -> DataLoader:
        dataloader = super().get_train_dataloader()
        wrapper = dataloader.batch_sampler  # on several ranks Accelerate's, which loses the epoch after a resume
        if self.sampler is not None and wrapper is not self.sampler:
            wrapper.set_epoch = self.sampler.set_epoch
        return dataloader

    def get_total_train_batch_size(self, args) -> int:
        return args.per_device_train_batch_size * self.accumulation_asked * args.world_size

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if not self.args.packing:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # num_items_in_batch counts the step's tokens on all ranks, over which the gradients will be averaged
        return summed_loss(model, self.head, inputs) * (self.accelerator.num_processes / num_items_in_batch)

    def _run_epoch(self, **kwargs) -> None:
        if (
            self.state.global_step < self.state.max_steps
        ):  # transformers 5.23 resumes a run at its end with one step more
            super()._run_epoch(**kwargs)

    def training_step(self, model, inputs, num_items_in_batch=None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.stops.saw(inputs, loss)
        if (
            self.accelerator.sync_gradients
        ):  # the step's last: the GPU has work in hand, and the next examples are gathered meanwhile
            self.ahead = (self.source[0], super().get_batch_samples(*self.source))
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        grad_norm = super()._get_grad_norm(model, grad_norm)
        self.stops.before_update(self, grad_norm)
        return grad_norm

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        (fetched_from, fetched), self.ahead = self.ahead, (None, None)
        if fetched_from is not epoch_iterator:
            fetched = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.source = (epoch_iterator, num_batches, device)
        batches, num_items_in_batch = fetched
        counts = take_counts(batches)
        self.meter.add_step(counts)
        self.current_flos += self.meter.flops.step(counts)
        return batches, num_items_in_batch

    def floating_point_ops(self, inputs) -> int:
        return 0  # counted above, from the examples' lengths; the stock one walks all parameters in each micro-batch

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self.meter.read())  # before the trackers and the log history see them
        super().log(logs, start_time)

    def get_eval_dataloader(self, eval_dataset=None) -> DataLoader:
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        size = {"max_examples": self.args.per_device_eval_batch_size}
        if self.args.packing:
            tokens = self.args.per_device_eval_batch_size * self.args.model_max_length
            size = {"max_tokens": max(tokens, self.sampler.max_tokens if self.sampler else 0)}
        sampler = EvalBatchSampler(dataset.lengths, self.args.world_size, self.args.process_index, **size)
        return DataLoader(dataset, batch_sampler=sampler, collate_fn=self.data_collator)

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        return token_weighted_loop(self, dataloader, self.loss_sum, metric_key_prefix)

    def loss_sum(self, model: torch.nn.Module, inputs: dict) -> torch.Tensor:
        """The loss summed over the trained tokens of one micro-batch."""
        # compute_loss divides by the step's tokens, and multiplies by the ranks whose mean the gradient will be
        ranks = self.args.world_size if self.args.average_tokens_across_devices else 1
        one = torch.ones((), device=self.args.device)
        return self.compute_loss(model, inputs, num_items_in_batch=one) / ranks

    def create_model_card(self, **kwargs) -> None:
        """push_to_hub's draft is left out: the card made from the report is in the folder already."""

    def _save_checkpoint(self, model, trial) -> None:
        run = self.fingerprint
        if self.args.packing:
            run = run | {"tokens_per_micro_batch": str(self.sampler.max_tokens)}
        with self.report.phase("checkpoints"):
            checkpoints.save_whole(self, run, partial(super()._save_checkpoint, model, trial))

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if self.before_writing and self.args.should_save:
            state_dict = self.before_writing(self.model.state_dict() if state_dict is None else state_dict)
        with safety.without_secrets(self.args, output_dir):
            super()._save(output_dir, state_dict)


def plan_micro_batches(trainer: SupervisedTrainer) -> PackedBatchSampler:
    """Decide what each micro-batch of the run holds and how it is computed, set the accumulation to match, and say all."""
    args, model, dtype = trainer.args, trainer.model, compute_dtype(trainer.args)
    arithmetic, lengths = plan(args, len(trainer.train_dataset)), trainer.train_dataset.lengths
    recipe = packing.recipe(args, lengths, **arithmetic)
    if not args.packing:
        return PackedBatchSampler(**recipe, max_tokens=0, padded=args.per_device_train_batch_size)
    run_tokens = arithmetic["steps"] * arithmetic["examples_per_step"] * lengths.mean()
    compiled = compiling.choose(args, model.num_parameters(), getattr(model, "is_quantized", False), run_tokens)
    say(compiled)
    compiling.prepare(model, args.device, compiled)
    if compiled.on:
        compile_loss()

    def trial(probe: PreTrainedModel, tokens: int) -> None:
        ids = torch.zeros(256, dtype=torch.int64)
        batch = trainer._prepare_inputs(PackedCollator()([{"input_ids": ids, "labels": ids}] * (tokens // 256)))
        # as Accelerate will wrap the model, which has not happened yet
        with torch.autocast(args.device.type, dtype, enabled=dtype != torch.float32):
            loss = summed_loss(probe, labelled_head(probe), batch)
        loss.backward()
        probe.zero_grad(set_to_none=True)

    prepare = partial(compiling.prepare, device=args.device, choice=compiled)
    beside = trainer.memory_plan.not_for_activations if trainer.memory_plan else None
    tokens = budget.choose(model, args, packing.largest_step(recipe), prepare, trial, beside)
    sampler = packing.within(recipe, tokens.tokens)
    trainer.packing_plan = packed = packing.describe(
        sampler,
        args.per_device_train_batch_size,
        args.gradient_accumulation_steps,
        args.model_max_length,
        tokens.reason,
    )
    say(packed)
    trainer.report.note("packing", **asdict(packed), line=str(packed))
    packing.adopt(args, sampler)
    return sampler


def choose_attention(model_args: ModelArguments, training_args: TrainingArguments) -> str:
    """Set the kernel for packed rows, and say and return why this one. Padded batches have transformers' own choice."""
    if not training_args.packing:
        return "--attn_implementation" if model_args.attn_implementation else "transformers' choice for padded batches"
    config, dtype = pretrained.load_config(model_args), compute_dtype(training_args)
    choice = attention.choose(config, training_args.device, dtype, model_args.attn_implementation)
    model_args.attn_implementation = choice.name
    say(choice)
    return choice.reason


def plan_memory(model_args: ModelArguments, args: TrainingArguments, lengths: np.ndarray) -> memory.Plan | None:
    """Say what the run will hold on each GPU and in the host, before a weight is loaded."""
    shape = memory.Shape.of(pretrained.load_config(model_args), model_args.lora_target_modules)
    step_tokens, compiled = None, False
    if args.packing and shape is not None:
        arithmetic = plan(args, len(lengths))
        step_tokens = packing.largest_step(packing.recipe(args, lengths, **arithmetic))
        run_tokens = arithmetic["steps"] * arithmetic["examples_per_step"] * lengths.mean()
        compiled = compiling.choose(args, shape.parameters, model_args.load_in_4bit, run_tokens).on
    return memory.plan(model_args, args, shape, step_tokens, compiled)


def watch(trainer: SupervisedTrainer, report: Report) -> None:
    """Count tokens, print the live line, keep the record, answer the evaluation prompts, stop early if asked to."""
    args, trainer.report = trainer.args, report
    trainer.data_collator = CountingCollator(trainer.data_collator)
    trainer.meter = Meter(
        ModelFlops.of(trainer.model),
        args.device,
        device_name(args.device),
        compute_dtype(args),
        gather=lambda numbers: trainer.accelerator.gather(numbers[None]),
    )
    callbacks: list[transformers.TrainerCallback] = []
    if trainer.eval_dataset is not None and args.eval_samples:
        generating = attention.padded if args.packing else nullcontext
        keep = report.record["samples"].append
        callbacks.append(AnswersCallback(trainer.eval_dataset, args.eval_samples, keep, generating))
    if args.early_stopping_patience:
        callbacks.append(EarlyStop(args.early_stopping_patience))
    replace_progress(trainer, *callbacks, ReportCallback(report), trainer.meter)


def prepare_saving(
    trainer: SupervisedTrainer, model_args: ModelArguments, data_args: DataArguments, resume: str | None
) -> None:
    """Refuse to continue another run than this one, watch for stops, and rehearse the saving before the first step."""
    before = checkpoints.run_of(resume) if resume else {}
    fingerprint.keep_token_budget(resume, before, trainer.args)
    tokenizer = cache.tokenizer_digest(trainer.processing_class)
    trainer.fingerprint = fingerprint.describe(trainer, model_args, load_template(data_args.prompt_template), tokenizer)
    if resume:
        fingerprint.refuse_changes(resume, before, trainer.fingerprint, trainer.args.resume_with_changes)
    trainer.stops = Stops()
    trainer.add_callback(trainer.stops)
    if trainer.args.save_rehearsal:
        trainer.add_callback(Rehearsal(trainer, export_dtype(trainer.args), trainer.report.add_seconds))


def export_model(trainer: SupervisedTrainer, model_args: ModelArguments, data_args: DataArguments) -> list[str]:
    """Write the tuned model, its tokenizer and its prompt template for plain transformers; return what was proved of them."""
    args, proved = trainer.args, []
    failing = checkpoints.stop_if_it_fails(Path(args.output_dir, "model"))
    with trainer.report.phase("save"), failing, memory.full_is_a_sentence(trainer.memory_plan):
        exporter = export.Exporter(trainer, model_args, export_dtype(args))
        if model_args.use_lora:
            saved = lora.save(trainer, model_args, export_dtype(args))
        else:
            saved = exporter.save_whole_model()
        if args.should_save:
            template = load_template(data_args.prompt_template)
            Path(args.output_dir, TEMPLATE_FILE).write_text(template, encoding="utf-8")
    with trainer.report.phase("proof"), all_ranks_or_none():
        pretrained.hold_deepspeed(args)  # rank 0 alone reloads: split by ZeRO-3, it would wait for the others for ever
        if args.should_save:
            proved = exporter.prove(saved)
    say(f"model saved in {args.output_dir}; proved: {'; '.join(proved)}")
    return proved


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


@restarts.new_store_for_each_attempt()
def train(load_tokenizer: LoadTokenizer, argv: list[str] | None = None) -> SupervisedTrainer:
    """Everything, in the order in which it happens. What can be known before weights load is refused before they do."""
    model_args, data_args, training_args = parse(
        argv,
        checks=(
            memory.stop_after_plan,
            data_problems,
            check_model,
            checkpoints.problems,
            check_deepspeed,
            lora.problems,
            evaluation.problems,
            tracker_problems,
        ),
    )
    keep_other_ranks_quiet()
    pretrained.hold_deepspeed(training_args)
    if export.nothing_is_left(training_args):
        raise SystemExit(0)
    report = Report(model_args, data_args, training_args, draw)
    with report.phase("load"), all_ranks_or_none():
        tokenizer = load_tokenizer(model_args, training_args)
    if data_args.check_data:
        raise SystemExit(check_data(tokenizer, data_args, training_args, pretrained.load_config(model_args).vocab_size))
    with report.phase("data"), all_ranks_or_none():
        data_module = make_supervised_data_module(tokenizer, data_args, training_args)
        check_ids(tokenizer, data_module, pretrained.load_config(model_args))
    resume = checkpoints.choose(training_args)
    say(describe_plan(model_args, training_args, len(data_module["train_dataset"])))
    attention_reason = choose_attention(model_args, training_args)
    memory_plan = plan_memory(model_args, training_args, data_module["train_dataset"].lengths)
    full = partial(memory.full_is_a_sentence, memory_plan)
    set_seed(training_args.seed)
    with report.phase("load"), full(), safety.safe_loads(model_args.model_name_or_path, deepspeed=False):
        pretrained.start_deepspeed(training_args)
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
    with report.phase("train"), full(), safety.safe_loads(resume, trainer.is_deepspeed_enabled):
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

"""Evaluate while training: one exact loss over all rows, and the model's answers to a few fixed prompts.

The loss is the mean over every trained token of the evaluation rows: each row once, whatever the number of ranks, the
batch size, padded or packed. No logits are kept.
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.utils.data import DataLoader, Sampler
from transformers.trainer_utils import EvalLoopOutput

from sft.data.template import TEMPLATE_FILES
from sft.job import say
from sft.model.answer import greedy_answers

ANSWER_TOKENS = 128  # longest answer to an evaluation prompt


def evaluation_problems(flags: Any) -> list[str]:
    """Contradictions between the evaluation flags."""
    evaluation, saves = (str(getattr(value, "value", value)) for value in (flags.eval_strategy, flags.save_strategy))
    rows, evaluates = bool(flags.eval_data_path or flags.eval_split), evaluation != "no"
    asked = ("early_stopping_patience", "load_best_model_at_end", "metric_for_best_model", "eval_on_start")
    needs = [f"--{name}" for name in asked if getattr(flags, name)] + ["--save_strategy best"] * (saves == "best")
    found = []
    if evaluates and not rows:
        found.append(
            f"--eval_strategy {evaluation}: there are no rows to evaluate. "
            "Add --eval_data_path FILE or --eval_split 0.02, or use --eval_strategy no."
        )
    if rows and not evaluates and flags.do_train:
        found.append(
            f"--{'eval_data_path' if flags.eval_data_path else 'eval_split'} is given and --eval_strategy is no: the rows "
            "would never be used. Add --eval_strategy epoch (or steps), or remove the flag."
        )
    for name in () if evaluates else needs:
        found.append(f"{name} needs evaluations: add --eval_strategy epoch (or steps) and rows to evaluate.")
    if flags.load_best_model_at_end and evaluates and saves not in (evaluation, "best"):
        found.append(
            f"--load_best_model_at_end needs a checkpoint for each evaluation, and --save_strategy is {saves} while "
            f"--eval_strategy is {evaluation}. Give both the same."
        )
    for name in ("early_stopping_patience", "eval_samples"):
        if getattr(flags, name) < 0:
            found.append(f"--{name} {getattr(flags, name)}: it cannot be negative. 0 switches it off.")
    return found


def without_training(flags: Any) -> list[str]:
    """With --do_train False make the rows to evaluate, and the template that the model was tuned with, those of the run.

    Returns: contradictions.
    """
    if flags.do_train:
        return []
    flags.data_path = flags.data_path or flags.eval_data_path
    for saved in (Path(flags.model_name_or_path, name) for name in TEMPLATE_FILES):
        if flags.prompt_template == "none" and saved.is_file():
            flags.prompt_template = str(saved)
    wrong = {
        "--do_train False evaluates a model without training it. Add --do_eval True and --eval_data_path FILE.": not flags.do_eval
        or not (flags.eval_data_path or flags.eval_split),
        "--do_train False holds the whole model on each GPU. Remove --fsdp and --deepspeed.": flags.fsdp
        or flags.deepspeed,
        "--do_train False with --use_lora True: evaluate the merged model (python -m sft.merge_lora). Remove the flag.": flags.use_lora,
        "--do_train False with --resume_from_checkpoint: name the checkpoint with --model_name_or_path.": flags.resume_from_checkpoint,
    }
    return [message for message, is_so in wrong.items() if is_so]


class EvalBatchSampler(Sampler[list[int]]):
    """This rank's batches of the evaluation rows: every row once over all ranks, and as many batches on each rank.

    Rows are taken longest first, so that a batch holds rows of one length and the largest batch comes first: what does
    not fit in memory fails at once. A rank that has a batch less than the others repeats one; `owned` says how many of
    its batches count.

    Lengths [3, 9, 4, 5], 10 tokens to a batch, 2 ranks -> batches [[1], [3, 2], [0]]
        rank 0: [[1], [0]], owned 2        rank 1: [[3, 2], [3, 2]], owned 1

    Args:
        lengths: tokens of each row.
        max_tokens: the budget of a packed batch; a longer row has a batch to itself.
        max_examples: rows of a padded batch. One of the two limits is given.
    """

    def __init__(self, lengths: Sequence[int], world_size: int, rank: int, max_tokens=math.inf, max_examples=math.inf):
        batches: list[list[int]] = []
        room_tokens = room_examples = 0.0
        for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
            if room_examples < 1 or room_tokens < lengths[row]:
                batches.append([])
                room_tokens, room_examples = max_tokens, max_examples
            batches[-1].append(row)
            room_tokens -= lengths[row]
            room_examples -= 1
        own = batches[rank::world_size]
        self.owned = len(own)
        rounds = -(-len(batches) // world_size)
        # every rank runs every round: under FSDP and ZeRO a forward pass is collective
        self.batches = own + [(own or batches)[-1]] * (rounds - len(own))

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)


def token_weighted_loop(trainer: Any, dataloader: DataLoader, prefix: str = "eval") -> EvalLoopOutput:
    """The Trainer's evaluation loop, with one mean over all trained tokens instead of a mean of batch means.

    Args:
        trainer: the `SupervisedTrainer`; its `loss_sum` gives the loss summed over a batch's trained tokens.
        dataloader: has an `EvalBatchSampler`; its batches carry their `counts`, as training batches do.

    Returns: metrics PREFIX_loss, PREFIX_perplexity and PREFIX_tokens; no predictions.
    """
    model = trainer.model  # as the Trainer's own loop: under DDP the model itself, under FSDP the sharded one
    model.eval()
    trainer.callback_handler.eval_dataloader = dataloader
    owned = dataloader.batch_sampler.owned  # type: ignore[union-attr]
    # float64: thousands of batches are summed, and the order differs with the number of ranks
    total = torch.zeros((), dtype=torch.float64, device=trainer.args.device)
    tokens = 0
    for index, inputs in enumerate(dataloader):
        trained = inputs.pop("counts").trained
        with torch.no_grad(), trainer.compute_loss_context_manager():
            loss = trainer.loss_sum(model, trainer._prepare_inputs(inputs))
        if index < owned:
            total += loss.detach().double()
            tokens += trained
        trainer.callback_handler.on_prediction_step(trainer.args, trainer.state, trainer.control)
    every = trainer.accelerator.gather(torch.stack([total, torch.full_like(total, tokens)])[None])
    loss_total, token_total = every.sum(dim=0).tolist()
    mean = loss_total / token_total
    metrics = {"loss": mean, "perplexity": math.exp(mean) if mean < 700 else math.inf, "tokens": int(token_total)}
    metrics = {f"{prefix}_{name}": value for name, value in metrics.items()}
    rows = len(dataloader.dataset)  # type: ignore[arg-type]
    return EvalLoopOutput(predictions=None, label_ids=None, metrics=metrics, num_samples=rows)  # type: ignore[arg-type]


class EarlyStop(transformers.TrainerCallback):
    """End the training after `patience` evaluations in a row without a lower loss.

    transformers' EarlyStoppingCallback (5.23) asserts flags of --load_best_model_at_end, and counts from 0 again in a
    resumed run. This one counts in the run's log, which a checkpoint carries.
    """

    def __init__(self, patience: int):
        self.patience = patience

    def on_train_begin(self, args, state, control, **kwargs):
        # a run that stopped here, and was killed before its model was exported, takes no further step
        self.on_evaluate(args, state, control)

    def on_evaluate(self, args, state, control, **kwargs):
        losses = [(entry["eval_loss"], entry["step"]) for entry in state.log_history if "eval_loss" in entry]
        if not losses:
            return
        # a NaN is lower than nothing, and nothing is lower than a NaN
        best = min(range(len(losses)), key=lambda index: (math.isnan(losses[index][0]), losses[index][0]))
        if len(losses) - 1 - best >= self.patience:
            lowest, step = losses[best]
            say(f"stopped at step {state.global_step}: the evaluation loss was lowest at step {step} ({lowest:.4f})")
            control.should_training_stop = True


class AnswersCallback(transformers.TrainerCallback):
    """The model's greedy answers to a few fixed evaluation prompts, after each evaluation.

    Every rank generates the same answers in the same number of forward passes, so sharded weights (FSDP, ZeRO-3) are
    gathered by all; rank 0 keeps the text.

    Args:
        dataset: the evaluation rows; has `first_answer`.
        count: how many prompts, taken evenly from the first row to the last.
        keep: called by rank 0 with each {"step", "prompt", "reference", "answer", "cut"}.
        generating: (model) -> a context in which it can generate: packed training has attention of its own.
    """

    def __init__(self, dataset: Any, count: int, keep: Callable[[dict], None], generating: Callable = nullcontext):
        self.keep, self.generating = keep, generating
        count = min(count, len(dataset))
        rows = [index * len(dataset) // count for index in range(count)]
        cuts = [(dataset[row]["input_ids"].tolist(), *dataset.first_answer(row)) for row in rows]
        self.prompts, self.references = [ids[:a] for ids, a, _ in cuts], [ids[a:b] for ids, a, b in cuts]

    def on_evaluate(self, args, state, control, model=None, processing_class=None, **kwargs):
        # layers compiled for training would be compiled again for each length of the cache
        with self.generating(model), torch.compiler.set_stance("force_eager"):
            answers = greedy_answers(model, processing_class, self.prompts, args.device, ANSWER_TOKENS)
        if not state.is_world_process_zero:
            return

        def text_of(ids: list[int]) -> str:
            return processing_class.decode(ids, skip_special_tokens=True)

        prompts = [text_of(prompt) for prompt in self.prompts]
        for prompt, asked, reference, (answer, cut) in zip(
            prompts, differing(prompts), self.references, answers, strict=True
        ):
            texts = {"prompt": prompt, "reference": text_of(reference), "answer": text_of(answer)}
            self.keep({"step": state.global_step, **texts, "cut": cut})
            say(f"  {shorten(asked, 40)} -> {shorten(texts['answer'])}   (data: {shorten(texts['reference'])})")


def differing(texts: list[str]) -> list[str]:
    """The texts without the words that all of them begin and end with, their template: ["Q: a?\\nA:", "Q: b?\\nA:"] -> ["a?", "b?"]"""
    if len(set(texts)) < 2:
        return texts
    begin = alike(texts)
    rests = [text[begin:] for text in texts]
    end = alike([rest[::-1] for rest in rests])
    return [rest[: len(rest) - end] for rest in rests]


def alike(texts: list[str]) -> int:
    """How many characters all texts begin with, in whole words."""
    place = next((place for place, here in enumerate(zip(*texts)) if len(set(here)) > 1), min(map(len, texts)))
    return place - len(re.split(r"\s", texts[0][:place])[-1])


def shorten(text: str, width: int = 60) -> str:
    """The text on one line, cut to `width` characters."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"

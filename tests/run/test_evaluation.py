"""Evaluation while training: one exact loss however it is computed, the answers, the best model, what is refused."""

import contextlib
import json
import math
import re
from types import SimpleNamespace

import jobs
import pytest
import torch
import transformers
from accelerate import Accelerator
from scripts import ROOT
from watched import EVALUATED, TEMPLATE, flags_for, watch

import utils
from sft.data.llama_tokenizer import load_llama_tokenizer
from sft.job import UserError
from sft.run import evaluation

# -------------------------------------------------------------------------------------------------------- evaluation


def mean_loss_of_rows(folder, dataset):
    """Row by row, with plain transformers and the whole logits: (mean over trained tokens, trained tokens)."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    total = tokens = 0
    for index in range(len(dataset)):
        ids, prompt = dataset[index]["input_ids"], int(dataset.prompt_lengths[index])
        with torch.no_grad():
            logits = model(ids[None]).logits[0]
        losses = torch.nn.functional.cross_entropy(logits[prompt - 1 : -1].double(), ids[prompt:], reduction="sum")
        total, tokens = total + float(losses), tokens + len(ids) - prompt
    return total / tokens, tokens


def test_the_evaluation_loss_is_the_mean_over_all_tokens(watched):
    last = watched.record["evaluations"][-1]
    loss, tokens = mean_loss_of_rows(watched.folder, watched.trainer.eval_dataset)
    assert last["eval_tokens"] == tokens
    assert last["eval_loss"] == pytest.approx(loss, rel=1e-5)
    assert last["eval_perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)


def test_padded_and_packed_give_one_loss(watched, watched_padded):
    assert [run.record["flags"]["training"]["packing"] for run in (watched, watched_padded)] == [True, False]
    packed, padded = ([entry["eval_loss"] for entry in run.record["evaluations"]] for run in (watched, watched_padded))
    assert len(packed) == 3 and max(packed) - min(packed) > 0.1
    assert packed == pytest.approx(padded, rel=1e-5)


def test_the_batch_size_changes_nothing(watched_padded, monkeypatch):
    trainer, losses, means = watched_padded.trainer, [], []
    Accelerator(cpu=True)  # its state was reset by whoever parsed flags since (transformers 5.23, training_args.py)
    for size in (1, 5, 16):
        monkeypatch.setattr(trainer.args, "per_device_eval_batch_size", size)
        loader = trainer.get_eval_dataloader()
        losses.append(evaluation.token_weighted_loop(trainer, loader).metrics["eval_loss"])
        means.append(mean_of_batch_means(trainer, loader))
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)
    assert watched_padded.record["evaluations"][-1]["eval_loss"] == pytest.approx(losses[0], rel=1e-6)
    assert means != pytest.approx([means[0]] * 3, rel=1e-4)  # what the stock loop computes does change


def mean_of_batch_means(trainer, loader):
    means = []
    for inputs in loader:
        tokens = inputs.pop("counts").trained
        with torch.no_grad():
            means.append(float(trainer.loss_sum(trainer.model, inputs)) / tokens)
    return sum(means) / len(means)


@pytest.mark.parametrize(("mean", "perplexity"), [(690.0, math.exp(690.0)), (709.9, math.inf), (math.nan, math.inf)])
def test_a_perplexity_that_no_number_holds_is_infinite(watched_padded, monkeypatch, mean, perplexity):
    """exp(709.9) is an OverflowError, after all the work."""
    trainer = watched_padded.trainer
    Accelerator(cpu=True)
    loader = trainer.get_eval_dataloader()
    per_token = torch.tensor(mean, dtype=torch.float64)
    labels = -100
    monkeypatch.setattr(
        trainer, "loss_sum", lambda model, inputs: per_token * (inputs["labels"][:, 1:] != labels).sum()
    )
    metrics = evaluation.token_weighted_loop(trainer, loader).metrics
    assert metrics["eval_loss"] == pytest.approx(mean, nan_ok=True)
    assert metrics["eval_perplexity"] == pytest.approx(perplexity)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["ddp", "zero3"])
def test_two_ranks_give_the_loss_and_the_answers_of_one(watched, tiny_llama, questions_csv, tmp_path, engine):
    """The same six examples in each step, over two processes, whole or sharded; the old name of the flag."""
    flags = flags_for(tiny_llama, questions_csv, tmp_path / "model", EVALUATED, "--per_device_train_batch_size 1")
    flags = ["--evaluation_strategy" if word == "--eval_strategy" else word for word in flags]
    if engine == "zero3":
        pytest.importorskip("deepspeed")
        config = (ROOT / "ds_config.json").read_text()
        (tmp_path / "zero3.json").write_text(config.replace('"stage": 2', '"stage": 3'))
        flags += ["--deepspeed", str(tmp_path / "zero3.json")]
    printed = jobs.run(flags, 2, tmp_path / "log")
    assert printed.count("evaluation at step 4: loss") == 1
    assert "`--evaluation_strategy steps` is now `--eval_strategy steps`" in printed
    record = json.loads((tmp_path / "model" / "run_report.json").read_text())
    assert record["batch"]["ranks"] == record["hardware"]["ranks"] == 2
    assert record["batch"]["examples_per_step"] == watched.record["batch"]["examples_per_step"]
    one, two = watched.record["evaluations"], record["evaluations"]
    assert [entry["eval_tokens"] for entry in two] == [entry["eval_tokens"] for entry in one]
    close = 1e-5 if engine == "ddp" else 1e-3  # DeepSpeed's Adam rounds otherwise, which adds up over the steps
    assert [entry["eval_loss"] for entry in two] == pytest.approx([entry["eval_loss"] for entry in one], rel=close)
    assert two[0]["eval_loss"] == pytest.approx(one[0]["eval_loss"], rel=1e-5)
    assert record["samples"] == watched.record["samples"]
    final, of_one = record["final"], watched.record["final"]
    assert all(final[name] == of_one[name] for name in ("tokens", "trained_tokens"))
    # a rank shares prefixes with itself alone
    assert 0 < final["shared_share"] < of_one["shared_share"] and final["model_flops"] > of_one["model_flops"]


@pytest.mark.parametrize("limit", [{"max_tokens": 10}, {"max_examples": 3}])
@pytest.mark.parametrize("world_size", [1, 2, 3, 7])
@pytest.mark.parametrize("lengths", [[3, 9, 4, 5], [50], [1] * 20, [7, 30, 2, 2, 2, 9, 10, 4]])
def test_every_evaluation_row_counts_once(lengths, world_size, limit):
    ranks = [evaluation.EvalBatchSampler(lengths, world_size, rank, **limit) for rank in range(world_size)]
    assert len({len(rank) for rank in ranks}) == 1  # a forward pass is collective under FSDP and ZeRO
    counted = [row for rank in ranks for batch in list(rank)[: rank.owned] for row in batch]
    assert sorted(counted) == list(range(len(lengths)))
    for batch in (batch for rank in ranks for batch in rank):
        assert len(batch) <= limit.get("max_examples", 99)
        assert len(batch) == 1 or sum(lengths[row] for row in batch) <= limit.get("max_tokens", 999)


def test_batches_as_drawn():
    ranks = [evaluation.EvalBatchSampler([3, 9, 4, 5], 2, rank, max_tokens=10) for rank in (0, 1)]
    assert [list(rank) for rank in ranks] == [[[1], [0]], [[3, 2], [3, 2]]]
    assert [rank.owned for rank in ranks] == [2, 1]


@pytest.mark.parametrize(("rows", "count", "taken"), [(8, 2, [0, 4]), (9, 4, [0, 2, 4, 6]), (3, 4, [0, 1, 2])])
def test_prompts_are_taken_from_all_over_the_rows(rows, count, taken):
    class Rows:
        def __len__(self):
            return rows

        def __getitem__(self, row):
            return {"input_ids": torch.tensor([row, 100 + row])}

        def first_answer(self, row):
            return 1, 2

    callback = evaluation.AnswersCallback(Rows(), count, print)
    assert callback.prompts == [[row] for row in taken]
    assert callback.references == [[100 + row] for row in taken]


def test_a_long_answer_is_one_line_of_so_many_characters():
    assert evaluation.shorten("a  b\n c", 5) == "a b c"
    assert evaluation.shorten("abcdef", 6) == "abcdef" and evaluation.shorten("abcdefg", 6) == "abcde…"


class Loader(list):
    """Batches of a rank that owns the first of its two, and repeats it to keep step with the others."""

    dataset, batch_sampler = range(4), SimpleNamespace(owned=1)


def test_a_repeated_batch_is_computed_and_not_counted():
    computed = []
    trainer = SimpleNamespace(
        model=torch.nn.Linear(1, 1),
        args=SimpleNamespace(device=torch.device("cpu")),
        state=None,
        control=None,
        callback_handler=SimpleNamespace(on_prediction_step=lambda *_: None),
        compute_loss_context_manager=contextlib.nullcontext,
        loss_sum=lambda model, inputs: computed.append(model.training) or torch.tensor(6.0),
        _prepare_inputs=lambda inputs: inputs,
        accelerator=SimpleNamespace(gather=lambda mine: torch.cat([mine, torch.tensor([[14.0, 7.0]]).double()])),
    )
    batches = Loader({"counts": SimpleNamespace(trained=3)} for _ in range(2))
    done = evaluation.token_weighted_loop(trainer, batches)
    assert computed == [False, False] and done.num_samples == 4, "no dropout is drawn"
    assert done.metrics == {"eval_loss": 2.0, "eval_perplexity": pytest.approx(math.exp(2)), "eval_tokens": 10}


def test_answers_are_what_plain_transformers_generates(watched):
    samples = watched.record["samples"]
    assert [sample["step"] for sample in samples] == [0, 0, 4, 4, 8, 8]
    model = transformers.AutoModelForCausalLM.from_pretrained(watched.folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(watched.folder)
    for sample in samples[-2:]:
        assert sample["prompt"].startswith("Question: ") and sample["reference"].endswith(".")
        ids = tokenizer(sample["prompt"], return_tensors="pt").input_ids
        answer = model.generate(ids, max_new_tokens=evaluation.ANSWER_TOKENS, do_sample=False)[0, ids.shape[1] :]
        assert sample["answer"] == tokenizer.decode(answer, skip_special_tokens=True)


DESTROYS = (
    "--eval_split 0.25 --eval_strategy steps --eval_steps 1 --eval_samples 0 --learning_rate 0.2 --num_train_epochs 3"
)
DESTROYS += " --per_device_train_batch_size 6"  # 24 steps at a rate that first learns and then destroys


@pytest.mark.slow
def test_the_best_model_is_exported_and_the_run_stops_early(tiny_llama, questions_csv, tmp_path):
    best = "--early_stopping_patience 2 --load_best_model_at_end True --save_strategy steps --save_steps 1"
    run = watch(tiny_llama, questions_csv, tmp_path / "model", DESTROYS, best)
    losses = [entry["eval_loss"] for entry in run.record["evaluations"]]
    assert run.record["status"] == "stopped" and len(losses) < 24
    assert losses.index(min(losses)) == len(losses) - 3  # two evaluations in a row were no better
    final, lowest = run.record["final"], run.record["evaluations"][-3]
    assert (final["best_step"], final["eval_loss"]) == (lowest["step"], lowest["eval_loss"])
    loss, _ = mean_loss_of_rows(run.folder, run.trainer.eval_dataset)
    assert loss == pytest.approx(min(losses), rel=1e-5)
    assert f"stopped at step {len(losses)}: the evaluation loss was lowest at step {lowest['step']}" in run.printed


@pytest.mark.slow
def test_stopping_early_does_not_need_the_best_model(tiny_llama, questions_csv, tmp_path):
    run = watch(tiny_llama, questions_csv, tmp_path / "model", DESTROYS, "--early_stopping_patience 1")
    losses = [entry["eval_loss"] for entry in run.record["evaluations"]]
    assert len(losses) < 24 and losses.index(min(losses)) == len(losses) - 2
    assert run.record["final"]["eval_loss"] == losses[-1] and "best_step" not in run.record["final"]


@pytest.mark.parametrize(
    ("losses", "stops"),
    [
        ([3.0, 2.0], False),
        ([3.0, 2.0, 2.1], False),
        ([3.0, 2.0, 2.1, 2.0], True),  # no lower is no better
        ([3.0, 2.0, 2.1, 1.9], False),
        ([math.nan, 2.0], False),
        ([math.nan, 2.0, 1.9], False),  # a NaN was lower than nothing
        ([3.0, math.nan, math.nan], True),
        ([math.nan], False),
    ],
)
def test_patience_of_two(losses, stops):
    control = transformers.TrainerControl()
    log = [{"loss": 9.0, "step": 1}, *({"eval_loss": loss, "step": index} for index, loss in enumerate(losses))]
    evaluation.EarlyStop(2).on_evaluate(None, SimpleNamespace(log_history=log, global_step=7), control)
    assert control.should_training_stop is stops


# ------------------------------------------------------------------------------------- what is refused before training


def evaluation_flags(**changes):
    flags = {"eval_data_path": None, "eval_split": 0.0, "eval_strategy": "no", "early_stopping_patience": 0}
    flags |= {"load_best_model_at_end": False, "save_strategy": "steps", "eval_samples": 4, "do_train": True}
    flags |= {"metric_for_best_model": None, "eval_on_start": False}
    return SimpleNamespace(**(flags | changes))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"eval_strategy": "steps"}, "--eval_strategy steps: there are no rows to evaluate. Add --eval_data_path"),
        ({"eval_split": 0.1}, "--eval_split is given and --eval_strategy is no: the rows would never be used."),
        ({"eval_data_path": "a.csv"}, "--eval_data_path is given and --eval_strategy is no"),
        ({"early_stopping_patience": 2}, "--early_stopping_patience needs evaluations: add --eval_strategy epoch"),
        ({"load_best_model_at_end": True}, "--load_best_model_at_end needs evaluations"),
        ({"metric_for_best_model": "loss"}, "--metric_for_best_model needs evaluations"),
        ({"save_strategy": "best"}, "--save_strategy best needs evaluations"),
        ({"eval_on_start": True}, "--eval_on_start needs evaluations"),
        ({"eval_samples": -1}, "--eval_samples -1: it cannot be negative"),
    ],
)
def test_contradictions_of_the_evaluation_flags(flags, message):
    (problem,) = evaluation.evaluation_problems(evaluation_flags(**flags))
    assert problem.startswith(message)


def test_flags_without_contradiction():
    assert evaluation.evaluation_problems(evaluation_flags()) == []
    assert (
        evaluation.evaluation_problems(
            evaluation_flags(eval_split=0.1, eval_strategy="epoch", early_stopping_patience=2)
        )
        == []
    )


EVERY_EPOCH = "--eval_strategy epoch"


@pytest.mark.parametrize(
    ("eval_csv", "flags", "message"),
    [
        (
            "question,response\na,b\n",
            EVERY_EPOCH,
            "{csv}: no column 'prompt'. Its columns are 'question', 'response'. Name the right one with --source.",
        ),
        ("prompt,response\n", EVERY_EPOCH, "{csv}: a header and no rows. Add the training examples below it."),
        (
            "prompt,response\n ,b\n",
            EVERY_EPOCH,
            "{csv}: 1 row read, 0 kept (0 cut, without EOS); dropped: 1 empty, 0 whose prompt leaves no room. "
            "Nothing is left to evaluate: fill in the empty prompts and responses, or name other columns.",
        ),
        (None, f"{EVERY_EPOCH} --eval_split 1.5", "--eval_split 1.5: give a share from 0 up to 1, such as 0.02."),
        (None, f"{EVERY_EPOCH} --eval_split 0.995", "--eval_split 0.995 leaves none of 64 examples to train on; "),
        (
            None,
            f"{EVERY_EPOCH} --eval_split 0.1 --load_best_model_at_end True",
            "--load_best_model_at_end needs a checkpoint for each evaluation, and --save_strategy is no while --eval_strategy is "
            "epoch. Give both the same.",
        ),
    ],
)
def test_rows_that_cannot_be_evaluated(tiny_llama, questions_csv, tmp_path, monkeypatch, eval_csv, flags, message):
    monkeypatch.setattr(utils, "load_model", lambda *_: pytest.fail("the weights were loaded"))
    argv = flags_for(tiny_llama, questions_csv, tmp_path / "model", flags)
    if eval_csv is not None:
        (tmp_path / "eval.csv").write_text(eval_csv)
        argv += ["--eval_data_path", str(tmp_path / "eval.csv")]
    with pytest.raises(UserError) as error:
        utils.train(load_llama_tokenizer, argv)
    (problem,) = error.value.problems
    assert problem.startswith(message.format(csv=tmp_path / "eval.csv"))
    assert not (tmp_path / "model").exists()


@pytest.mark.slow
def test_a_run_that_stopped_early_and_was_killed_in_its_export_takes_no_further_step(
    tiny_llama, questions_csv, tmp_path, monkeypatch, capsys
):
    from sft.run.prepare import Run

    def killed(self, trainer):
        raise KeyboardInterrupt

    flags = flags_for(tiny_llama, questions_csv, tmp_path / "out", EVALUATED)
    flags += "--early_stopping_patience 1 --learning_rate 5 --eval_steps 1 --save_strategy steps --save_steps 1 --max_steps 8".split()
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Run, "_export", killed)
        utils.train(load_llama_tokenizer, flags)
    stopped = int(re.search(r"stopped at step (\d+): the evaluation loss was lowest", capsys.readouterr().out)[1])
    trainer = utils.train(load_llama_tokenizer, [*flags, "--resume_from_checkpoint", "True"])
    assert 0 < stopped < 8 and trainer.state.global_step == stopped
    assert (tmp_path / "out" / "COMPLETE.json").is_file()


def test_the_template_of_prompts_is_left_out():
    assert evaluation.differing(["Q: a?\nA:", "Q: b?\nA:"]) == ["a?", "b?"]
    assert evaluation.differing(["Name Ann", "Name Anna"]) == ["Ann", "Anna"]
    assert (
        evaluation.differing(["a X b", "a X Y X b"]) == ["b", "Y X b"]
        and evaluation.differing(["same"] * 2) == ["same"] * 2
    )


# ---- without training


@pytest.mark.slow
def test_a_finished_model_is_evaluated_without_training(watched, tiny_llama, questions_csv, tmp_path, capsys):
    """The same rows, the same template: the loss that the run itself found at its end; nothing of the model changes."""
    before = {path.name: path.read_bytes() for path in watched.folder.iterdir() if path.is_file()}
    words = ["--model_name_or_path", str(watched.folder), "--data_path", str(questions_csv), "--eval_split", "0.25"]
    words += [
        "--output_dir",
        str(tmp_path / "out"),
        "--data_cache_dir",
        str(tmp_path / "cache"),
        "--model_max_length",
        "64",
    ]
    words += ["--do_train", "False", "--do_eval", "True"]
    utils.train(load_llama_tokenizer, [*words, "--eval_samples", "0"])
    record = json.loads((tmp_path / "out" / "run_report.json").read_text())
    (found,) = record["evaluations"]
    assert found["eval_loss"] == pytest.approx(watched.record["evaluations"][-1]["eval_loss"], rel=1e-5)
    assert record["status"] == "finished" and record["final"]["eval_loss"] == found["eval_loss"]
    assert record["template"]["text"] == TEMPLATE
    printed = capsys.readouterr().out
    assert f"evaluation at step 0: loss {found['eval_loss']:.4f}, perplexity" in printed and "warning" not in printed
    assert "optimizer steps" not in printed and "training:" not in printed
    assert {path.name: path.read_bytes() for path in watched.folder.iterdir() if path.is_file()} == before
    assert {path.name for path in (tmp_path / "out").iterdir()} <= {"run_report.json", "loss.png", ".run", ".run.lock"}
    with pytest.raises(UserError, match="it holds a finished model"):  # whatever else is given
        more = ["--output_dir", str(watched.folder), "--overwrite_output_dir", "True"]
        utils.train(load_llama_tokenizer, [*words, *more])

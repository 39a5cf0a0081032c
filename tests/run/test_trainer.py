"""The Trainer is whole when it is built, and overrides little of the stock one that is private."""

import ast
import json
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from saved_runs import flags_for, losses, train
from scripts import ROOT, save_llama
from transformers import Trainer

from sft.job import UserError
from sft.run import trainer as trainer_module
from sft.run.step_message import StepMessage
from sft.run.trainer import SupervisedTrainer

sys.path.insert(0, str(ROOT / "examples"))
import make_tiny_llama


def assigned(source: str) -> list[str]:
    """What a text assigns to a trainer from outside, in whatever way.

    "trainer.a = 1; run.trainer.b += 1; setattr(trainer, 'c', 1)" -> ["trainer.a", "run.trainer.b", "setattr(trainer, 'c', 1)"]
    """

    def is_trainer(node: ast.AST) -> bool:
        return ast.unparse(node).split(".")[-1] in ("trainer", "_trainer")

    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and not isinstance(node.ctx, ast.Load) and is_trainer(node.value):
            found.append(ast.unparse(node))
        elif isinstance(node, ast.Call) and node.args and is_trainer(node.args[0]):
            name = ast.unparse(node.func).split(".")[-1]
            found += [ast.unparse(node)] * (name in ("setattr", "swapped"))
    return found


def test_nothing_is_attached_to_a_trainer_from_outside():
    folders = ("", "sft/**/", "benchmarks/", "examples/", ".ci/")
    files = [path for folder in folders for path in ROOT.glob(f"{folder}*.py")]
    assert {ROOT / "utils.py", ROOT / "sft/run/prepare.py", ROOT / "benchmarks/bench_step.py"} <= set(files)
    found = {path: assigned(path.read_text(encoding="utf-8")) for path in files if path.name != "trainer.py"}
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("trainer.meter = None", ["trainer.meter"]),
        ("run.trainer.a, b = 1, 2", ["run.trainer.a"]),
        ("trainer.steps += 1\ndel trainer.c", ["trainer.steps", "trainer.c"]),
        ("for trainer.x in y: pass", ["trainer.x"]),
        ("setattr(trainer, name, 1)", ["setattr(trainer, name, 1)"]),
        ("with swapped(self.trainer, a=1): pass", ["swapped(self.trainer, a=1)"]),
        ("trainer.state.best_global_step = 1\nx = trainer.meter\ntrainer.train()", []),
    ],
)
def test_an_attachment_would_be_seen(source, expected):
    assert sorted(assigned(source)) == sorted(expected)


def test_a_step_has_as_many_examples_as_were_asked_for(watched):
    args = watched.trainer.args  # 2 per device x 3 accumulation, in fewer micro-batches
    assert args.gradient_accumulation_steps < 3
    assert watched.trainer.get_total_train_batch_size(args) == 6


def test_an_evaluation_batch_holds_what_a_training_batch_may(watched, monkeypatch):
    trainer, whole = watched.trainer, int(watched.trainer.eval_dataset.lengths.sum())

    def most(budget: int) -> int:
        monkeypatch.setattr(trainer.sampler, "max_tokens", budget)
        batches = trainer.get_eval_dataloader().batch_sampler
        return max(sum(trainer.eval_dataset.lengths[batch]) for batch in batches)

    assert 100 < most(1) <= 3 * 64 < whole == most(whole)  # per device x --model_max_length, or more


@pytest.mark.parametrize(("step", "there", "saves"), [(0, False, False), (4, False, True), (4, True, False)])
def test_a_broken_step_leaves_a_checkpoint_of_the_step_before(tmp_path, monkeypatch, step, there, saves):
    monkeypatch.setattr(trainer_module, "explain_non_finite", lambda *_: "the loss is nan")
    saved = []
    run = SimpleNamespace(
        args=SimpleNamespace(output_dir=str(tmp_path)),
        state=SimpleNamespace(global_step=step),
        message=SimpleNamespace(micro_batches=[]),
        model_wrapped=None,
        model=None,
        _save_checkpoint=lambda *_: saved.append(step),
    )
    if there:
        (tmp_path / f"checkpoint-{step}").mkdir()
    with pytest.raises(UserError, match="the loss is nan"):
        SupervisedTrainer._stop_before_update(run, 0.0)
    assert saved == [step] * saves


@pytest.mark.parametrize(("fp16", "stops"), [(False, True), (True, False)])
def test_a_gradient_that_deepspeed_could_not_use_ends_the_run_unless_fp16_looks_for_its_loss_scale(
    monkeypatch, fp16, stops
):
    run = SupervisedTrainer.__new__(SupervisedTrainer)
    run.args, run.state = SimpleNamespace(fp16=fp16), SimpleNamespace(stateful_callbacks={})
    run.is_deepspeed_enabled, run.deepspeed = True, SimpleNamespace(optimizer=SimpleNamespace(overflow=True))
    run.meter, run.stops, run.loss_since_log = None, SimpleNamespace(requested=None), 0.0
    run.message = StepMessage(torch.device("cpu"), gather=lambda numbers: numbers)
    run.message.add({}, torch.tensor(2.0))
    stopped = []
    run._stop_before_update = stopped.append
    monkeypatch.setattr(Trainer, "_get_grad_norm", lambda *_: 0.5)  # ZeRO-3 leaves the last step's in place
    assert run._get_grad_norm(None) == 0.5
    assert stopped == [0.5] * stops


def test_each_epoch_has_an_order_of_its_own():
    epochs = []
    run = SimpleNamespace(
        sampler=SimpleNamespace(set_epoch=epochs.append), state=SimpleNamespace(global_step=8, max_steps=8)
    )
    for epoch in (0, 1):
        SupervisedTrainer._run_epoch(run, epoch=epoch)  # at the run's end, where no step more is taken
    assert epochs == [0, 1]


def test_dropout_on_another_number_of_ranks_draws_what_no_step_drew(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "_load_rng_state", lambda *_: torch.manual_seed(99))  # as if its own file were there
    trainer = object.__new__(SupervisedTrainer)
    trainer.args, trainer.state = SimpleNamespace(seed=3, world_size=2), SimpleNamespace(global_step=5)
    for rank in range(2):
        (tmp_path / f"rng_state_{rank}.pth").touch()

    def drawn(seed: int) -> torch.Tensor:
        return torch.rand(2, generator=torch.Generator().manual_seed(seed))

    with torch.random.fork_rng():
        trainer._load_rng_state(str(tmp_path))
        assert torch.equal(torch.rand(2), drawn(99))
        (tmp_path / "rng_state_2.pth").touch()
        trainer._load_rng_state(str(tmp_path))
        assert torch.equal(torch.rand(2), drawn(3 + 5))


def test_what_is_logged_is_the_mean_since_the_last_log_and_the_runs_own_mean(monkeypatch):
    logged = []
    monkeypatch.setattr(Trainer, "log", lambda self, logs, start_time: logged.append(logs))
    monkeypatch.setattr(Trainer, "_maybe_log_save_evaluate", lambda *_: None)
    trainer = object.__new__(SupervisedTrainer)
    trainer.meter, trainer.control = None, SimpleNamespace(should_log=True)
    trainer.state = SimpleNamespace(global_step=7, stateful_callbacks={"RunLoss": {"sum": 30.0, "steps": 10}})
    trainer._globalstep_last_logged, trainer.loss_since_log, trainer._total_loss_scalar = 4, 6.0, 1.0
    for _ in range(2):  # at the end of the run it is asked twice, and nothing is new
        trainer._maybe_log_save_evaluate(torch.tensor(9.0), 0.5, None, None, 1.0, None, 0.0, 1e-3)
    assert logged == [{"loss": 2.0, "grad_norm": 0.5, "learning_rate": 1e-3}]
    assert (trainer.loss_since_log, trainer._total_loss_scalar, trainer._globalstep_last_logged) == (0.0, 7.0, 7)
    trainer.log({"train_loss": 1.5})  # the stock one's is the mean since the resume
    assert logged[1:] == [{"train_loss": 3.0}]


@pytest.mark.parametrize(("average", "loss"), [(True, 5.0), (False, 10.0)])
def test_a_loss_sum_is_of_this_ranks_tokens_alone(average, loss):
    trainer = object.__new__(SupervisedTrainer)
    trainer.args = SimpleNamespace(world_size=2, average_tokens_across_devices=average)
    trainer.compute_loss = lambda model, inputs, num_items_in_batch: 10.0 / num_items_in_batch
    assert trainer.loss_sum(None, {}) == loss


@pytest.mark.parametrize("router", [False, True])
def test_a_padded_routers_loss_counts_by_the_trained_tokens_of_its_batch(monkeypatch, router):
    def of_the_model(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return 12.0 / num_items_in_batch + 0.5 * router  # the router's loss is a mean, added once

    monkeypatch.setattr(Trainer, "compute_loss", of_the_model)
    trainer = object.__new__(SupervisedTrainer)
    trainer.args = SimpleNamespace(packing=False)
    trainer.model = SimpleNamespace(config=SimpleNamespace(output_router_logits=router))
    batch = {"labels": torch.tensor([[5, -100, 6, 7], [8, 9, -100, -100]])}  # nothing predicts the first column
    loss = trainer.compute_loss(None, batch, num_items_in_batch=24)
    assert loss == pytest.approx(12 / 24 + (0.5 * 3 / 24 if router else 0))
    batch["labels"][:] = -100
    assert trainer.compute_loss(None, batch, num_items_in_batch=24) == pytest.approx(0 if router else 12 / 24)


def test_few_private_methods_are_overridden():
    private = {name for name in vars(SupervisedTrainer) if name.startswith("_") and not name.startswith("__")}
    overridden = {name for name in private if hasattr(Trainer, name)}
    assert len(overridden) <= 5, overridden
    assert "_run_epoch" in overridden, "the search finds them"
    assert "_get_train_sampler" not in overridden


@pytest.mark.slow
def test_packed_is_padded_with_several_trained_runs_in_an_example(tmp_path):
    texts = [f"{n} and {turn}, a line\n" for n in range(24) for turn in range(4)]
    save_llama(tmp_path / "model", vocab_size=280)
    (tmp_path / "model" / "tokenizer.model").write_bytes(make_tiny_llama.train_tokenizer(texts, vocab_size=280))
    turns = [
        [{"role": role, "content": f"{n} and {turn}"} for turn in range(1 + n % 4) for role in ("user", "assistant")]
        for n in range(24)
    ]
    (tmp_path / "chats.jsonl").write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in turns))
    flags = partial(flags_for, tmp_path / "model", tmp_path / "chats.jsonl")
    given = "--messages messages --model_max_length 256 --max_steps 3 --save_steps 3".split()
    packed = train(*flags(tmp_path / "packed", *given))
    answers = np.concatenate([part.answers() for part in packed.train_dataset.parts])
    assert answers.tolist() == [1 + n % 4 for n in range(24)]
    train(*flags(tmp_path / "padded", *given, "--packing", "False"))
    for one, other in zip(losses(tmp_path / "packed"), losses(tmp_path / "padded"), strict=True):
        assert one == pytest.approx(other, rel=1e-5)

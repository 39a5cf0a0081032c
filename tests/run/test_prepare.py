"""What is wrong is said together, before anything slow; a disk that is full after training."""

import contextlib
import errno
import json
import re
import shutil
import weakref
from functools import partial

import jobs
import pytest
import torch
from saved_runs import flags_for, losses, train
from scripts import save_llama
from transformers import LlamaConfig

import utils
from sft.data.llama_tokenizer import load_llama_tokenizer
from sft.job import UserError
from sft.report.record import Report
from sft.run import prepare
from sft.run.trainer import SupervisedTrainer


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--deepspeed", "missing.json"], "--deepspeed missing.json: there is no such file"),
        (["--deepspeed", "{broken}"], "{broken}, line 2, column 3: this is not JSON"),
        (["--deepspeed", "{text}"], 'zero_optimization.stage is "2": it must be one of the numbers'),
        (
            ["--use_lora", "True", "--lora_target_modules", "query"],
            "--lora_target_modules query: no linear layer of this model has that name. It has down_proj",
        ),
        (["--use_lora", "True", "--load_in_4bit", "True"], "--load_in_4bit needs a CUDA GPU"),
        (["--lora_r", "8"], "--lora_r: set, but LoRA is off"),
    ],
)
def test_bad_input_is_one_message_before_weights_load(words, message, tiny_llama, questions_csv, tmp_path, monkeypatch):
    pytest.importorskip("deepspeed")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(utils, "load_model", lambda *args: pytest.fail("the weights were loaded"))
    monkeypatch.setenv("RANK", "0")
    files = {"broken": tmp_path / "broken.json", "text": tmp_path / "text.json"}
    files["broken"].write_text("{\n  broken: 1\n}")
    files["text"].write_text('{"zero_optimization": {"stage": "2"}}')
    words = [word.replace("{broken}", str(files["broken"])).replace("{text}", str(files["text"])) for word in words]
    given = flags_for(tiny_llama, questions_csv, tmp_path / "out")
    with pytest.raises(UserError) as refused:
        utils.train(load_llama_tokenizer, [*given, *words])
    assert len(refused.value.problems) == 1
    assert message.replace("{broken}", str(files["broken"])) in refused.value.problems[0]


@pytest.mark.slow
def test_the_script_says_it_once_and_exits_with_2(tiny_llama, questions_csv, tmp_path):
    given = flags_for(tiny_llama, questions_csv, tmp_path / "out")
    said = jobs.run([*given, "--deepspeed", "missing.json", "--lora_r", "8"], 1, tmp_path / "log", expect=2)
    assert said.count("--deepspeed missing.json: there is no such file") == 1
    assert said.count("--lora_r: set, but LoRA is off") == 1
    assert "Traceback" not in said


def problems_of(*flags: str) -> list[str]:
    with pytest.raises(UserError) as raised:
        utils.train(load_llama_tokenizer, list(flags))
    return raised.value.problems


def test_what_is_known_before_anything_slow_is_said_together(whole_run, tmp_path):
    before = sorted(whole_run.iterdir())
    flags = flags_for(
        tmp_path / "nothing", tmp_path / "no.csv", whole_run, "--prompt_template", str(tmp_path / "no.txt")
    )
    assert problems_of(*flags, "--bf16", "True", "--fp16", "True") == [
        "--bf16 and --fp16 are two compute types. Choose one; bf16 where the GPU has it.",
        f"--prompt_template {tmp_path / 'no.txt'}: No such file or directory. Give 'none', 'alpaca', 'turns', 'chat', a text file, or a .jinja file.",
        f"{tmp_path / 'no.csv'}: No such file or directory. Give a file that can be read.",
        f"{tmp_path / 'nothing'}: no such folder.",
        f"{whole_run}: it holds a finished model. Name another --output_dir, or give --overwrite_output_dir True.",
    ]
    assert sorted(whole_run.iterdir()) == before
    assert not (tmp_path / "cache").exists()


def test_a_folder_without_weights_and_a_class_that_the_model_lacks(tiny_llama, questions_csv, tmp_path):
    no_weights = shutil.copytree(tiny_llama, tmp_path / "no_weights", ignore=shutil.ignore_patterns("*.safetensors"))
    assert problems_of(*flags_for(no_weights, questions_csv, tmp_path / "model")) == [
        f"{no_weights}: a config.json but no weights (model.safetensors). Download the model completely."
    ]
    fsdp = ["--fsdp", "full_shard auto_wrap", "--fsdp_transformer_layer_cls_to_wrap", "MistralDecoderLayer"]
    assert problems_of(*flags_for(tiny_llama, questions_csv, tmp_path / "model", *fsdp)) == [
        f"{tiny_llama} has no layer of class MistralDecoderLayer, which FSDP should wrap. "
        "Its decoder layer: LlamaDecoderLayer."
    ]


def test_what_one_rank_finds_in_the_data_is_told_to_all(tiny_llama, questions_csv, tmp_path, monkeypatch):
    told = []

    @contextlib.contextmanager
    def all_ranks_or_none():
        try:
            yield
        except UserError as error:
            told.extend(error.problems)
            raise

    def load_tokenizer(*_):
        raise UserError("no tokenizer here")

    monkeypatch.setattr(utils.job, "all_ranks_or_none", all_ranks_or_none)
    with pytest.raises(UserError):
        utils.train(load_tokenizer, flags_for(tiny_llama, questions_csv, tmp_path / "model"))
    assert told == ["no tokenizer here"]


def test_random_numbers_begin_with_the_seed_when_the_model_is_made(tiny_llama, questions_csv, tmp_path, monkeypatch):
    """LoRA's additions are drawn there, before a Trainer sets the seed."""
    seeds = []

    def load_model(*_):
        seeds.append(torch.initial_seed())
        raise UserError("seen")

    monkeypatch.setattr(utils, "load_model", load_model)
    torch.manual_seed(99)
    assert problems_of(*flags_for(tiny_llama, questions_csv, tmp_path / "model", "--seed", "7")) == ["seen"]
    assert seeds == [7]


def test_token_ids_outside_the_embedding_are_refused_before_weights_load(tiny_llama, questions_csv, tmp_path):
    small = shutil.copytree(tiny_llama, tmp_path / "small")
    save_llama(small, vocab_size=280)
    problems = problems_of(*flags_for(small, questions_csv, tmp_path / "model"))
    assert len(problems) == 1
    assert re.match(r"tokenizer: 40 tokens outside the model's embedding of 280 rows \(.+ = 280, ", problems[0])
    assert not (tmp_path / "model").exists()


def test_an_eos_that_is_not_the_models_is_refused(tiny_llama, questions_csv, tmp_path):
    other = shutil.copytree(tiny_llama, tmp_path / "other")
    config = LlamaConfig.from_pretrained(tiny_llama)
    config.eos_token_id = 7
    config.save_pretrained(other)
    assert any("EOS" in p for p in problems_of(*flags_for(other, questions_csv, tmp_path / "model")))


@pytest.mark.parametrize(
    ("where", "name", "found"),
    [
        (prepare.checkpoint, "hold_output_dir", UserError("held")),
        (prepare.resume, "choose_checkpoint", UserError("held")),
        (prepare, "too_many_positions", ("held", True)),
        (prepare, "differences_from_rank_0", ["held"]),
        (prepare, "refuse_full_disk", UserError("held")),
    ],
)
def test_each_guard_is_asked_before_weights_load(tiny_llama, questions_csv, tmp_path, monkeypatch, where, name, found):
    """Its own test says what it finds; here, that it is asked and that its answer ends the run."""

    def guard(*_):
        if isinstance(found, UserError):
            raise found
        return found

    monkeypatch.setattr(where, name, guard)
    monkeypatch.setattr(utils, "load_model", lambda *args: pytest.fail("the weights were loaded"))
    assert problems_of(*flags_for(tiny_llama, questions_csv, tmp_path / "out")) == ["held"]


def test_what_a_checkpoint_decides_is_kept_before_anything_is_settled(
    two_checkpoints, tiny_llama, questions_csv, monkeypatch
):
    kept = []
    for name in ("keep_padding", "keep_token_budget", "keep_layout", "refuse_changes"):
        monkeypatch.setattr(prepare.resume, name, lambda checkpoint, *_, name=name: kept.append((name, checkpoint)))
    monkeypatch.setattr(utils, "load_model", lambda *_: problems_of_loading())
    flags = flags_for(tiny_llama, questions_csv, two_checkpoints, "--resume_from_checkpoint", "True")
    assert problems_of(*flags) == ["loading"]
    newest = str(two_checkpoints / "checkpoint-16")
    assert kept == [(name, newest) for name in ("keep_padding", "keep_token_budget", "keep_layout", "refuse_changes")]


def problems_of_loading():
    raise UserError("loading")


def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.slow
def test_a_disk_that_is_full_after_training_leaves_the_model_and_a_sentence(
    tiny_llama, questions_csv, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(Report, "_write_record", full)
    flags = ["--max_steps", "1", "--save_strategy", "no", "--save_rehearsal", "False"]
    train(*flags_for(tiny_llama, questions_csv, tmp_path / "out", *flags))
    assert capsys.readouterr().out.count("run_report.json was not written: OSError: [Errno 28] No space left") == 1
    assert "| train loss | " in (tmp_path / "out" / "README.md").read_text()
    monkeypatch.setattr(prepare, "write_card", full)
    with pytest.raises(
        UserError, match=r"the model is saved and proved and can be used, but its card or COMPLETE.json"
    ):
        train(*flags_for(tiny_llama, questions_csv, tmp_path / "other", *flags))


def test_longer_rows_of_an_evaluation_are_refused_too_where_they_decide_on_ropes_frequencies(
    tiny_llama, questions_csv, tmp_path, monkeypatch
):
    """The rows that are trained have at most 30 tokens."""
    monkeypatch.setattr(utils, "load_model", lambda *args: pytest.fail("the weights were loaded"))
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 40, "rope_parameters": rope}))
    (tmp_path / "long.csv").write_text(f'prompt,response\nshort,one\nlong,"{"a b c " * 30}"\n')
    flags = ["--eval_data_path", str(tmp_path / "long.csv"), "--eval_strategy", "epoch", "--packing", "False"]
    with pytest.raises(UserError, match="1 of 2 examples are longer than 40 tokens, above which this model's rope"):
        train(*flags_for(folder, questions_csv, tmp_path / "out", *flags))


def leak_in_packed_rows(model):
    """A fault of the last layer alone, which the copy of the first ones does not have, and of packed rows alone."""

    def mix(layer, args, kwargs):
        if kwargs.get("cu_seq_lens_q") is None:
            return None
        return (args[0] + args[0].roll(1, dims=1), *args[1:]), kwargs

    model.model.layers[-1].register_forward_pre_hook(mix, with_kwargs=True)
    return model


@pytest.fixture
def leaky(monkeypatch):
    real, made = utils.load_model, []

    def load_model(*how):
        model = leak_in_packed_rows(real(*how))
        made.append(weakref.ref(model))
        return model

    monkeypatch.setattr(utils, "load_model", load_model)
    return made


WHY = "examples see each other (a loss moves by"


def test_what_only_the_whole_model_shows_pads_the_run(leaky, tiny_llama, questions_csv, tmp_path, monkeypatch, capsys):
    def padded(trainer, **_):
        raise UserError(f"a step with head {trainer.head}, {trainer.args.gradient_accumulation_steps} micro-batches")

    monkeypatch.setattr(SupervisedTrainer, "_run_epoch", padded)
    flags = flags_for(tiny_llama, questions_csv, tmp_path / "out", "--save_rehearsal", "False")
    (problem,) = problems_of(*flags, "--packing", "True")
    assert problem.startswith(f"--packing True: {WHY}") and problem.endswith("Remove the flag, and the run is padded.")
    assert "this run is padded" not in capsys.readouterr().out
    assert problems_of(*flags) == ["a step with head None, 4 micro-batches"]
    assert f"packing: off, this run is padded: {WHY}" in capsys.readouterr().out


@pytest.mark.slow
def test_a_finished_models_claim_goes_when_a_new_run_begins_and_not_when_it_is_refused(
    whole_run, tiny_llama, questions_csv, tmp_path, monkeypatch
):
    def stopped(*_, **__):
        raise UserError("begun")

    shutil.copytree(whole_run, tmp_path / "out")
    flags = flags_for(tiny_llama, questions_csv, tmp_path / "out", "--overwrite_output_dir", "True", "--seed", "7")
    (problem,) = problems_of(*flags, "--resume_from_checkpoint", "True", "--max_steps", "20")
    assert "seed" in problem and (tmp_path / "out/COMPLETE.json").is_file()
    monkeypatch.setattr(SupervisedTrainer, "_run_epoch", stopped)
    assert problems_of(*flags) == ["begun"] and not (tmp_path / "out/COMPLETE.json").exists()


@pytest.mark.slow
def test_such_a_run_is_the_padded_one_and_goes_on_padded(leaky, tiny_llama, questions_csv, tmp_path, capsys):
    flags = partial(flags_for, tiny_llama, questions_csv)
    given = ["--max_steps", "6"]
    train(*flags(tmp_path / "out", *given))
    said = capsys.readouterr().out
    assert said.count(f"packing: off, this run is padded: {WHY}") == 1 and ", with the whole model\n" in said
    assert [model() is None for model in leaky] == [True, False]
    record = json.loads((tmp_path / "out/run_report.json").read_text())
    assert "packing" not in record and record["proof"]["tried"][-1]["weights"] == "the whole model"
    train(*flags(tmp_path / "padded", *given, "--packing", "False"))
    assert losses(tmp_path / "out") == losses(tmp_path / "padded")
    (tmp_path / "out/COMPLETE.json").unlink()
    shutil.rmtree(tmp_path / "out/checkpoint-6")
    train(*flags(tmp_path / "out", *given, "--resume_from_checkpoint", "True"))
    assert f"packing: off, as in {tmp_path / 'out/checkpoint-3'}" in capsys.readouterr().out
    assert losses(tmp_path / "out") == losses(tmp_path / "padded")

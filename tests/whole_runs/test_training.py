"""The path from a CSV to a saved model, in one process and through torchrun."""

import json
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import jobs
import pytest
import torch
from safetensors.torch import load_file
from scripts import QUESTIONS, ROOT, run_script, save_llama
from tokenizer_files import write_gpt2_files
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from transformers.trainer_pt_utils import LabelSmoother

import utils
from sft.data.llama_tokenizer import load_llama_tokenizer

RECIPE = "--num_train_epochs 1 --learning_rate 1e-2 --lr_scheduler_type cosine --warmup_ratio 0.1 --logging_steps 1"
RECIPE += " --model_max_length 64 --save_strategy no --evaluation_strategy no --disable_tqdm True --seed 3"


def flags_for(model: Path, csv: Path, output: Path, *more: str) -> list[str]:
    cache = output.parent / "cache"
    return [
        "--model_name_or_path", str(model), "--data_path", str(csv), "--output_dir", str(output),
        "--data_cache_dir", str(cache), *RECIPE.split(), *more,
    ]  # fmt: skip


def losses_of(trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def printed_losses(text: str) -> list[float]:
    return [float(value) for value in re.findall(r"loss['\"]?:? *'?([0-9.]+)", text)]


@pytest.fixture(scope="module")
def padded_run(tiny_llama, questions_csv, tmp_path_factory):
    """8 examples in one micro-batch, padded, one process: the reference of the comparisons below."""
    output = tmp_path_factory.mktemp("padded") / "model"
    flags = flags_for(tiny_llama, questions_csv, output, "--packing", "False", "--per_device_train_batch_size", "8")
    return utils.train(load_llama_tokenizer, [*flags, "--gradient_accumulation_steps", "1"]), output


def test_the_model_learns_and_every_step_is_logged(padded_run):
    losses = losses_of(padded_run[0])
    assert len(losses) == 8
    assert losses[-1] < losses[0] - 0.5


def assert_same_weights(folder, reference) -> None:
    expected = load_file(reference / "model.safetensors")
    for name, weight in load_file(folder / "model.safetensors").items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_accumulation_does_not_change_losses_or_weights(padded_run, tiny_llama, questions_csv, tmp_path):
    reference, folder = padded_run
    batch = ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "8"]
    flags = flags_for(tiny_llama, questions_csv, tmp_path / "model", "--packing", "False", *batch)
    trainer = utils.train(load_llama_tokenizer, flags)
    assert losses_of(trainer) == pytest.approx(losses_of(reference), rel=1e-4)
    assert_same_weights(tmp_path / "model", folder)


@pytest.mark.slow
def test_the_last_steps_are_logged_though_they_fill_no_interval(padded_run, tiny_llama, questions_csv, tmp_path):
    """The same examples in each step again, 2 x 4 of them, and a mean of the losses of every three steps."""
    batch = ["--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "4", "--logging_steps", "3"]
    flags = flags_for(tiny_llama, questions_csv, tmp_path / "model", "--packing", "False", *batch)
    trainer = utils.train(load_llama_tokenizer, flags)
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [3, 6, 8]
    losses = losses_of(padded_run[0])
    means = [sum(losses[:3]) / 3, sum(losses[3:6]) / 3, sum(losses[6:]) / 2]
    assert losses_of(trainer) == pytest.approx(means, rel=1e-4)
    assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(sum(losses) / 8, rel=1e-4)
    assert_same_weights(tmp_path / "model", padded_run[1])


@pytest.mark.slow
def test_another_order_of_the_examples_does_change_the_losses(padded_run, tiny_llama, questions_csv, tmp_path):
    flags = flags_for(tiny_llama, questions_csv, tmp_path / "model", "--packing", "False", "--seed", "4")
    trainer = utils.train(load_llama_tokenizer, [*flags, "--per_device_train_batch_size", "8", "--max_steps", "1"])
    (loss,) = losses_of(trainer)
    assert loss != pytest.approx(losses_of(padded_run[0])[0], rel=1e-4)


@pytest.mark.slow
def test_smoothed_labels_are_the_same_packed_padded_and_by_transformers_own_sum(tiny_llama, questions_csv, tmp_path):
    """One step over all rows, after an evaluation of them by the same weights, and one evaluation more."""
    batch = ["--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "8", "--max_steps", "1"]
    batch += ["--eval_data_path", str(questions_csv), "--eval_strategy", "steps", "--eval_steps", "1"]
    batch += ["--eval_on_start", "True", "--eval_samples", "0", "--label_smoothing_factor", "0.2"]
    found = {}
    for packing in ("True", "False"):
        folder = tmp_path / packing
        flags = flags_for(tiny_llama, questions_csv, folder, "--save_rehearsal", "False", "--packing", packing)
        trainer = utils.train(load_llama_tokenizer, [*flags, *batch])
        evaluated = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
        found[packing] = [*losses_of(trainer), *evaluated]
    model, dataset = AutoModelForCausalLM.from_pretrained(tiny_llama), trainer.train_dataset
    padded = utils.DataCollatorForSupervisedDataset(trainer.processing_class)([dataset[i] for i in range(len(dataset))])
    labels = padded.pop("labels")
    with torch.no_grad():
        stock = LabelSmoother(0.2)(model(**padded), labels, shift_labels=True).item()
        unsmoothed = model(**padded, labels=labels).loss.item()
    assert found["True"] == pytest.approx(found["False"], rel=1e-5)
    assert found["True"][:2] == pytest.approx([stock, stock], rel=1e-5)
    assert unsmoothed != pytest.approx(stock, rel=1e-4)
    assert_same_weights(tmp_path / "True", tmp_path / "False")


def test_the_saved_model_is_plain_transformers_and_gives_the_same_logits(padded_run):
    trainer, folder = padded_run
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (model.dtype, model.config.use_cache) == (torch.float32, True)
    ids = tokenizer("What is 3 plus 4?", return_tensors="pt").input_ids
    assert ids[0, 0] == tokenizer.bos_token_id
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, trainer.model.eval()(ids).logits, rtol=0, atol=0)
    assert (folder / "prompt_template.txt").read_text() == "{instruction}"
    assert (folder / "tokenizer.json").is_file()


@pytest.mark.slow
def test_a_bfloat16_checkpoint_is_trained_in_float32_and_exported_in_the_type_asked_for(
    tiny_llama, questions_csv, tmp_path, capsys
):
    """Its generation config asks for sampling settings without sampling, which could not be saved again."""
    stored = shutil.copytree(tiny_llama, tmp_path / "stored")
    LlamaForCausalLM.from_pretrained(tiny_llama, dtype=torch.bfloat16).save_pretrained(stored)
    assert load_file(stored / "model.safetensors")["lm_head.weight"].dtype == torch.bfloat16
    (stored / "generation_config.json").write_text('{"temperature": 0.6, "top_p": 0.9, "do_sample": false}')
    flags = flags_for(stored, questions_csv, tmp_path / "model", "--max_steps", "1", "--save_dtype", "float16")
    trainer = utils.train(load_llama_tokenizer, flags)
    assert {p.dtype for p in trainer.model.parameters()} == {torch.float32}
    exported = load_file(tmp_path / "model" / "model.safetensors")
    assert {weight.dtype for weight in exported.values()} == {torch.float16}
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == "float16"
    assert "do_sample set to True" in capsys.readouterr().out
    assert json.loads((tmp_path / "model" / "generation_config.json").read_text())["do_sample"] is True


# ------------------------------------------------------------------------------------------- the scripts, as a user


@pytest.mark.slow
def test_two_ranks_equal_one_through_torchrun(padded_run, tiny_llama, questions_csv, tmp_path):
    reference, folder = padded_run
    flags = flags_for(tiny_llama, questions_csv, tmp_path / "model", "--per_device_train_batch_size", "2")
    fsdp = ["--fsdp", "full_shard auto_wrap", "--fsdp_transformer_layer_cls_to_wrap", "LlamaDecoderLayer"]
    printed = run_script(
        "llama_training.py", *flags, "--gradient_accumulation_steps", "2", "--packing", "False", *fsdp, processes=2
    )
    assert "2 CPU processes x 2 per device x 2 accumulation = 8 examples per optimizer step" in printed
    assert printed.count("examples per optimizer step") == 1
    assert "this run is plain DDP" in printed
    assert printed_losses(printed)[:8] == pytest.approx(losses_of(reference), rel=2e-3)  # four printed digits
    assert_same_weights(tmp_path / "model", folder)


@pytest.mark.slow
def test_the_xgen_script_in_two_ranks(questions_csv, tmp_path):
    base, output = tmp_path / "xgen", tmp_path / "model"
    save_llama(base, vocab_size=51200, bos_token_id=50256, eos_token_id=50256, hidden_size=16)
    gpt2_files = write_gpt2_files(tmp_path / "gpt2")
    flags = flags_for(base, questions_csv, output, "--gpt2_files", str(gpt2_files), "--bf16", "True")
    flags += ["--per_device_train_batch_size", "1", "--gradient_accumulation_steps", "16", "--save_dtype", "float32"]
    flags += ["--fsdp", "full_shard auto_wrap", "--fsdp_transformer_layer_cls_to_wrap", "LlamaDecoderLayer"]
    printed = jobs.run(flags, 2, tmp_path / "log", script="xgen_training.py")
    assert "2 CPU processes x 1 per device x 16 accumulation = 32 examples per optimizer step" in printed
    assert "float32 weights, gradients and optimizer state, bfloat16 compute, exported as float32" in printed
    assert len(printed_losses(printed)) >= 2
    tokenizer, model = AutoTokenizer.from_pretrained(output), AutoModelForCausalLM.from_pretrained(output)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) == (50256, 50256, None)
    assert (model.config.vocab_size, model.generation_config.eos_token_id) == (51200, 50256)
    assert tokenizer("a  b\t\tc<fim_prefix>").input_ids[-1] == 50295
    before = load_file(base / "model.safetensors")["model.embed_tokens.weight"]
    moved = (load_file(output / "model.safetensors")["model.embed_tokens.weight"] != before).any(dim=1)
    trained = {i for row in QUESTIONS for i in tokenizer(row[0] + row[1]).input_ids} | {50256}
    assert moved[sorted(trained)].float().mean() > 0.9
    assert not moved[50257:].any()  # rows of tokens that no text has; weight decay is 0


@pytest.mark.slow
def test_two_machines(padded_run, tiny_llama, questions_csv, tmp_path):
    """Two agents on one machine stand for two machines, with the flag for FSDP that docs/several_machines.md has."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = flags_for(
        tiny_llama, questions_csv, tmp_path / "model", "--per_device_train_batch_size", "4", "--packing", "False"
    )
    flags += ["--use_cpu", "True", "--fsdp", "hybrid_shard auto_wrap"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv_id=test"]
    command += [
        "--rdzv_backend=c10d",
        f"--rdzv_endpoint=127.0.0.1:{port}",
        str(ROOT / "tests/support/fsdp_over_gloo.py"),
        *flags,
    ]
    agents = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in range(2)]
    printed = "".join(agent.communicate(timeout=300)[0] for agent in agents)
    assert [agent.returncode for agent in agents] == [0, 0], printed
    assert "--fsdp hybrid_shard: one rank on each machine shards with nobody: plain DDP" in printed
    assert printed_losses(printed)[:8] == pytest.approx(losses_of(padded_run[0]), rel=2e-3)


@pytest.mark.slow
def test_a_users_mistake_is_one_message_and_exit_code_2_on_every_rank(tiny_llama, tmp_path):
    bad = tmp_path / "bad.csv"
    bad.write_text("prompt,response\na,b,c\n")
    flags = flags_for(tiny_llama, bad, tmp_path / "model")
    printed = jobs.run(flags, 2, tmp_path / "log", expect=2)
    assert printed.count("error: ") == printed.count(f"error: {bad}, row 2: 3 fields where the header has 2.") == 1
    assert "Traceback" not in printed
    assert not (tmp_path / "model").exists()
    assert "Traceback" not in jobs.run(flags, 1, tmp_path / "alone.log", expect=2)


@pytest.mark.slow
def test_a_loaders_workers_do_not_keep_a_run_from_ending(tiny_llama, questions_csv, tmp_path):
    """They ignore signals, and the interpreter waits for them when an epoch has not ended."""
    flags = [
        "--model_name_or_path",
        str(tiny_llama),
        "--data_path",
        str(questions_csv),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    flags += ["--use_cpu", "True", "--max_steps", "1", "--dataloader_num_workers", "1", "--save_rehearsal", "False"]
    command = [sys.executable, str(ROOT / "llama_training.py"), *flags, "--data_cache_dir", str(tmp_path / "cache")]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert ended.returncode == 0 and "model saved in" in ended.stdout and "Traceback" not in ended.stderr

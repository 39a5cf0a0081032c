"""What is known to be wrong between data, tokenizer and model before weights load."""

import json
import shutil

import numpy as np
import pytest
from saved_runs import flags_for
from transformers import GPT2Config, LlamaConfig, OPTConfig

import utils
from sft.data import checks
from sft.data.checks import check_vocabulary, too_many_positions
from sft.data.llama_tokenizer import load_llama_tokenizer
from sft.flags import DataArguments
from sft.job import UserError

LENGTHS = np.array([16, 17, 30])


def test_check_vocabulary(llama, xgen):
    assert check_vocabulary(llama, LlamaConfig(vocab_size=700, eos_token_id=2)) == []
    assert check_vocabulary(llama, LlamaConfig(vocab_size=704, eos_token_id=[5, 2])) == []
    assert check_vocabulary(xgen, LlamaConfig(vocab_size=51200, eos_token_id=50256)) == []
    other_eos, outside = check_vocabulary(llama, LlamaConfig(vocab_size=699, eos_token_id=1))
    assert "EOS '</s>' is id 2, but the model's config.json says eos_token_id 1" in other_eos
    assert "1 token outside the model's embedding of 699 rows" in outside
    assert len(check_vocabulary(xgen, LlamaConfig(vocab_size=50304, eos_token_id=50256))) == 1


def test_problems_that_are_known_together_are_said_together(write, tmp_path):
    template = tmp_path / "template.txt"
    template.write_text("no column")
    flags = {"prompt_template": str(template), "eval_data_path": "no.csv", "eval_split": 0.5}
    said = checks.data_problems(DataArguments(data_path=write("a,b\n1,2\n"), **flags))
    assert [line.split(":")[0].split()[0] for line in said] == [
        "--prompt_template",
        "--eval_data_path",
        f"{tmp_path}/data.csv",
        f"{tmp_path}/data.csv",
        "no.csv",
    ]
    assert checks.data_problems(DataArguments(data_path=write([("a", "b")]), eval_split=1.0)) == [
        "--eval_split 1: give a share from 0 up to 1, such as 0.02."
    ]


def test_examples_that_are_longer_than_the_models_positions():
    assert too_many_positions(LlamaConfig(max_position_embeddings=30), LENGTHS) == ("", False)
    found = "2 of 3 examples are longer than the model's 16 positions (the longest has 30 tokens): --model_max_length 16 cuts them"
    stretched = ", a rope scaling in config.json (rope_parameters) stretches the positions"
    # computed positions have no table
    assert too_many_positions(LlamaConfig(max_position_embeddings=16, hidden_size=32), LENGTHS) == (
        found + stretched,
        False,
    )
    small = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2}
    for config in (
        GPT2Config(n_positions=16, n_embd=32, n_layer=1, n_head=2, **small),
        OPTConfig(
            max_position_embeddings=16, hidden_size=32, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2, **small
        ),
    ):
        assert too_many_positions(config, LENGTHS) == (
            found + "; the model has a table of positions that ends there",
            True,
        )


@pytest.fixture
def few_positions(tiny_llama, tmp_path):
    folder = tmp_path / "few_positions"
    shutil.copytree(tiny_llama, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 8}))
    return folder


def test_a_run_and_an_audit_count_them(few_positions, questions_csv, tmp_path, capsys, monkeypatch):
    def stop(*_):
        raise SystemExit("as far as it goes here")

    monkeypatch.setattr(utils.settle, "settle", stop)
    monkeypatch.setattr("sft.data.audit.draw_lengths", lambda *_: None)
    flags = flags_for(few_positions, questions_csv, tmp_path / "out")
    with pytest.raises(SystemExit, match="as far"):
        utils.train(load_llama_tokenizer, list(flags))
    text = "64 of 64 examples are longer than the model's 8 positions"
    assert f"warning: {text}" in capsys.readouterr().out
    with pytest.raises(SystemExit) as ended:
        utils.train(load_llama_tokenizer, [*flags, "--check_data", "True"])
    assert ended.value.code == 0 and f"- {text}" in capsys.readouterr().out

    monkeypatch.setattr("sft.data.checks._has_table_of", lambda *_: True)
    with pytest.raises(UserError, match="table of positions that ends there"):
        utils.train(load_llama_tokenizer, list(flags))
    with pytest.raises(SystemExit) as ended:
        utils.train(load_llama_tokenizer, [*flags, "--check_data", "True"])
    assert ended.value.code == 1

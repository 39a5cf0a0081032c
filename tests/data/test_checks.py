"""What is wrong with data or tokenizer is found before anything slow."""

from transformers import (
    LlamaConfig,
)

from sft.data import checks
from sft.data.checks import check_vocabulary
from sft.flags import DataArguments


def test_check_vocabulary(llama, xgen):
    assert check_vocabulary(llama, LlamaConfig(vocab_size=700, eos_token_id=2)) == []
    assert check_vocabulary(llama, LlamaConfig(vocab_size=704, eos_token_id=[5, 2])) == []
    assert check_vocabulary(xgen, LlamaConfig(vocab_size=51200, eos_token_id=50256)) == []
    other_eos, outside = check_vocabulary(llama, LlamaConfig(vocab_size=699, eos_token_id=1))
    assert "EOS '</s>' is id 2, but the model's config.json says eos_token_id 1" in other_eos
    assert "1 tokens have ids outside the model's embedding of 699 rows" in outside
    assert len(check_vocabulary(xgen, LlamaConfig(vocab_size=50304, eos_token_id=50256))) == 1


def test_problems_that_are_known_together_are_said_together(write, tmp_path):
    template = tmp_path / "template.txt"
    template.write_text("{instruction} and {instruction}")
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

"""What is wrong with data or tokenizer is found before anything slow."""

from transformers import (
    LlamaConfig,
)

from sft.data.checks import check_vocabulary


def test_check_vocabulary(llama, xgen):
    assert check_vocabulary(llama, LlamaConfig(vocab_size=700, eos_token_id=2)) == []
    assert check_vocabulary(llama, LlamaConfig(vocab_size=704, eos_token_id=[5, 2])) == []
    assert check_vocabulary(xgen, LlamaConfig(vocab_size=51200, eos_token_id=50256)) == []
    other_eos, outside = check_vocabulary(llama, LlamaConfig(vocab_size=699, eos_token_id=1))
    assert "EOS '</s>' is id 2, but the model's config.json says eos_token_id 1" in other_eos
    assert "1 tokens have ids outside the model's embedding of 699 rows" in outside
    assert len(check_vocabulary(xgen, LlamaConfig(vocab_size=50304, eos_token_id=50256))) == 1

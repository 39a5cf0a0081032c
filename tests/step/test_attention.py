"""Kernels keep examples apart, or are refused."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from sft.job import UserError
from sft.step.attention import choose_attention, per_example, stock_attention, varlen

CPU = torch.device("cpu")


def config(**changes) -> LlamaConfig:
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return LlamaConfig(**(shape | {"num_attention_heads": 4, "num_key_value_heads": 2} | changes))


def test_the_choice_says_why():
    assert str(choose_attention(config(), CPU, torch.float32)) == "attention: per_example (cpu, float32, head_dim 8)"
    assert choose_attention(config(), CPU, torch.float32, "per_example").reason.startswith("--attn_implementation")


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_a_kernel_that_isolates_is_accepted(name):
    assert choose_attention(config(), CPU, torch.float32, name).value == name


CUDA = torch.device("cuda")


@pytest.fixture
def an_ampere_card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    monkeypatch.setenv("CC", "true")


def test_on_a_card_the_kernel_is_tritons(an_ampere_card):
    where = "cuda, bfloat16, head_dim 64"
    small = config(head_dim=64)
    assert choose_attention(small, CUDA, torch.bfloat16)[1:] == ("triton", where)
    assert choose_attention(small, CUDA, torch.bfloat16, "triton")[1:] == ("triton", f"--attn_implementation; {where}")
    assert choose_attention(small, CUDA, torch.float32).value == "per_example"


def test_without_triton_varlen_is_chosen_and_why_is_said(an_ampere_card, monkeypatch):
    reason = "not triton: heads of 100, where it has 16, 32, 64, 128; cuda, bfloat16, head_dim 100"
    assert choose_attention(config(head_dim=100), CUDA, torch.bfloat16)[1:] == ("varlen", reason)
    small = config(head_dim=64)
    monkeypatch.setattr("shutil.which", lambda name: None)
    assert choose_attention(small, CUDA, torch.bfloat16).reason.startswith("not triton: Triton needs a C compiler")
    with pytest.raises(UserError, match=r"triton: Triton needs a C compiler.* Leave the flag out, and varlen is used"):
        choose_attention(small, CUDA, torch.bfloat16, "triton")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert choose_attention(small, CUDA, torch.bfloat16).reason.startswith("not triton: Triton is not installed")


def test_heads_of_256_are_the_largest_that_varlen_takes(an_ampere_card):
    kernels = {size: choose_attention(config(head_dim=size), CUDA, torch.bfloat16).value for size in (256, 264)}
    assert kernels == {256: "varlen", 264: "per_example"}


def test_kernels_that_cannot_run_here_are_refused():
    for kernel in ("varlen", "triton"):
        with pytest.raises(UserError, match=rf"{kernel} needs a GPU .* here it is cpu, float32, head_dim 8"):
            choose_attention(config(), CPU, torch.float32, kernel)
    windowed = config()
    windowed.sliding_window = 16
    with pytest.raises(UserError, match="sliding window of 16 tokens"):
        choose_attention(windowed, CPU, torch.float32)


@pytest.mark.parametrize("heads, key_heads, head_dim", [(4, 4, 8), (4, 2, 8), (6, 1, 5), (2, 2, 100)])
def test_per_example_attention_is_attention_of_each_example(heads, key_heads, head_dim):
    torch.manual_seed(0)
    lengths = [3, 1, 7]
    query = torch.randn(1, heads, 11, head_dim)
    key, value = torch.randn(2, 1, key_heads, 11, head_dim)
    starts = torch.tensor([0, 3, 4, 11], dtype=torch.int32)
    found, _ = per_example(None, query, key, value, None, scaling=0.3, cu_seq_lens_q=starts)
    assert found.shape == (1, 11, heads, head_dim)
    for start, length in zip(starts.tolist(), lengths):
        part = slice(start, start + length)
        for head in range(heads):
            shared = head // (heads // key_heads)
            scores = query[0, head, part] @ key[0, shared, part].T * 0.3
            scores.masked_fill_(torch.ones(length, length).triu(1).bool(), -torch.inf)
            torch.testing.assert_close(found[0, part, head], scores.softmax(-1) @ value[0, shared, part])


def test_dropout_of_attention_is_drawn_in_training():
    query, key, value = torch.randn(3, 1, 4, 6, 8)
    starts = torch.tensor([0, 2, 6], dtype=torch.int32)

    def out(dropout: float) -> torch.Tensor:
        return per_example(None, query, key, value, None, 0.3, dropout=dropout, cu_seq_lens_q=starts)[0]

    assert torch.equal(out(0.0), out(0.0)) and not torch.equal(out(0.0), out(0.9))


@pytest.mark.parametrize(
    "words", [{"is_causal": False}, {"window_size": (-1, -1)}, {"window_size": (-1, -1), "enable_gqa": False}]
)
def test_varlen_calls_torchs_kernel_in_each_versions_words(monkeypatch, words):
    """torch 2.10 to 2.13 spell causal attention and grouped heads differently; heads of 100 are padded to 104."""
    calls = []

    def kernel(q, k, v, starts, starts_k, longest, longest_k, scale, **options):
        calls.append((q.shape, k.shape, options))
        assert q.dtype == k.dtype == v.dtype == torch.bfloat16 and longest == longest_k == 3
        return q

    names = ", ".join(f"{name}={value!r}" for name, value in words.items())
    inner = {"kernel": kernel}
    passed = ", ".join(f"{name}={name}" for name in words)
    exec(
        f"def fake(q, k, v, a, b, c, d, *, scale=None, {names}): return kernel(q, k, v, a, b, c, d, scale, {passed})",
        inner,
    )
    monkeypatch.setattr("sft.step.attention.varlen_attn", inner["fake"])
    monkeypatch.setattr("sft.step.attention.VARLEN_WORDS", words.keys() | {"scale"})
    query, key = torch.randn(1, 4, 5, 100), torch.randn(1, 2, 5, 100)
    starts = torch.tensor([0, 2, 5], dtype=torch.int32)
    out, _ = varlen(None, query, key, key.bfloat16(), None, scaling=0.1, cu_seq_lens_q=starts, max_length_q=3)
    assert torch.equal(out, query.transpose(1, 2).bfloat16())
    shape, key_shape, options = calls[0]
    assert (shape, key_shape) == ((5, 4, 104), (5, 2, 104))
    assert options.get("is_causal", True) is True and options.get("window_size", (-1, 0)) == (-1, 0)
    assert options.get("enable_gqa", True) is True
    varlen(None, query, key, key.bfloat16(), None, 0.1, cu_seq_lens_q=starts, max_length_q=3, sliding_window=2)
    assert calls[1][2].get("window_size", (1, 0)) == (1, 0)  # itself and the token before it


def test_padded_gives_stock_attention_for_a_while():
    model = LlamaForCausalLM._from_config(config(), attn_implementation="per_example").eval()
    ids = torch.arange(1, 9)[None]
    with stock_attention(model):
        model(input_ids=ids)
    assert model.config._attn_implementation == "per_example"
    with pytest.raises(UserError, match="cu_seq_lens"):
        model(input_ids=ids)

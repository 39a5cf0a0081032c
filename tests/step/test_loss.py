"""What computes the losses changes neither them nor a gradient; Liger's kernels are interpreted on a CPU.

TRITON_INTERPRET=1 PYTHONPATH=.:tests/support python tests/step/test_loss.py
"""

import importlib.util
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from interpreted import run_interpreted
from transformers.trainer_pt_utils import LabelSmoother

from sft.step import loss
from sft.step.packed_rows import PackedCollator


@pytest.mark.parametrize("dtype, error", [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_the_summed_loss_and_its_gradients(monkeypatch, dtype, error):
    monkeypatch.setattr(loss, "CHUNK_BYTES", 4 * 50 * 7)  # chunks of 7 positions
    torch.manual_seed(0)
    hidden, weight = torch.randn(40, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    targets = torch.randint(0, 50, (40,))
    targets[[0, 7, 39]] = -100
    expected = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    wanted = torch.autograd.grad(expected / 7, (hidden, weight))
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        found = loss.SummedLoss.apply(hidden, weight, targets, loss.losses_and_gradient, True)
    got = torch.autograd.grad(found / 7, (hidden, weight))
    assert found.dtype == torch.float32 and [g.dtype for g in got] == [torch.float32] * 2
    assert abs(found - expected) / expected < error
    for a, b in zip(got, wanted):
        assert (a - b).norm() / b.norm() < error


def test_logits_of_a_chunk_stay_below_the_limit_and_frozen_heads_get_no_gradient(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_BYTES", 4 * 50 * 7)
    held = []

    def kernel(logits, targets):
        held.append(logits.numel() * 4)
        return loss.losses_and_gradient(logits, targets)

    hidden, weight = torch.randn(40, 16, requires_grad=True), torch.randn(50, 16)
    total = loss.SummedLoss.apply(hidden, weight, torch.zeros(40, dtype=torch.int64), kernel, True)
    assert max(held) <= 4 * 50 * 7 and len(held) == 6
    (of_hidden, of_weight) = total.grad_fn.gradients
    assert of_hidden is not None and of_weight is None


@pytest.mark.parametrize("scale, cap", [(0.5, None), (1.0, 3.0), (0.5, 3.0)])
def test_bent_logits_have_their_own_gradient(scale, cap):
    torch.manual_seed(0)
    logits, targets = 4 * torch.randn(5, 11, requires_grad=True), torch.tensor([1, -100, 3, 4, 10])
    logits.retain_grad()
    bent = logits * scale if cap is None else cap * torch.tanh(logits * scale / cap)
    F.cross_entropy(bent, targets, reduction="sum").backward()
    losses, gradient = loss.of_bent_logits(loss.losses_and_gradient, scale, cap)(logits.detach(), targets)
    assert losses.tolist() == pytest.approx(F.cross_entropy(bent, targets, reduction="none").tolist(), rel=1e-5)
    torch.testing.assert_close(gradient, logits.grad, rtol=1e-4, atol=1e-6)


def test_smoothed_targets_are_those_of_transformers_label_smoother(monkeypatch):
    monkeypatch.setattr(loss, "CHUNK_BYTES", 4 * 50 * 7)
    torch.manual_seed(0)
    hidden, weight = torch.randn(1, 40, 16, requires_grad=True), torch.randn(50, 16, requires_grad=True)
    labels = torch.randint(0, 50, (1, 40))
    labels[0, [0, 7, 39]] = -100

    def ours(smoothing: float) -> torch.Tensor:
        kernel, _ = loss.loss_kernel(torch.device("cpu"), compiled=False, smoothing=smoothing)
        return loss.SummedLoss.apply(hidden[0, :-1], weight, labels[0, 1:], kernel, True) / 37

    stock = LabelSmoother(0.2)((hidden @ weight.T,), labels, shift_labels=True, num_items_in_batch=37)
    assert ours(0.2).item() == pytest.approx(stock.item(), rel=1e-6)
    assert ours(0.0).item() != pytest.approx(stock.item(), rel=1e-2)
    wanted = torch.autograd.grad(stock, (hidden, weight))
    for a, b in zip(torch.autograd.grad(ours(0.2), (hidden, weight)), wanted):
        assert (a - b).norm() / b.norm() < 1e-6


def compare(frozen: bool, smoothing: float = 0.0) -> None:
    """A model's loss and gradients by Liger and by our own chunks; of other targets they differ."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from sft.step import attention, loss, modules  # noqa: F401  attention registers its kernels
    from sft.step.packed_rows import PackedCollator

    torch.manual_seed(0)
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=100, attn_implementation="per_example", **shape))
    model.lm_head.weight.data *= 20  # at the usual scale all losses are log(100)
    model.lm_head.requires_grad_(not frozen)
    head = modules.exchange(model, loss.loss_kernel(torch.device("cpu"), False, smoothing)[0])
    loss.CHUNK_BYTES = 8_000  # two chunks and more
    ids = torch.randint(0, 100, (44,))
    batch = PackedCollator()([{"input_ids": part, "labels": part.clone()} for part in ids.split([5, 9, 30])])

    def found(batch: dict) -> torch.Tensor:
        total = loss.summed_loss(model, head, batch)
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        return torch.cat([total.detach()[None], *(part.flatten() for part in torch.autograd.grad(total, weights))])

    batch["label_targets"][7] = -100  # as in a placeholder's row
    ours, other = found(batch), found({**batch, "label_targets": batch["label_targets"].flip(0)})
    head.kernel, choice = loss.loss_kernel(torch.device("cuda"), False, smoothing)
    assert choice.value == "Liger's kernel" and head.kernel is not loss.losses_and_gradient
    error, wrong = ((vector - ours).norm() / ours.norm() for vector in (found(batch), other))
    assert error < 1e-6 and wrong > 1e-2, (frozen, error, wrong)
    with torch.no_grad():
        assert abs(loss.summed_loss(model, head, batch) - ours[0]) < 1e-5 * ours[0]


@pytest.mark.slow
def test_liger_interpreted():
    pytest.importorskip("liger_kernel")
    assert run_interpreted(__file__) == "alike\n"


def test_the_kernel_is_chosen_with_its_reason(monkeypatch):
    from sft.step.loss import loss_kernel, losses_and_gradient

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    kernel, choice = loss_kernel(torch.device("cuda"), True)
    assert str(choice) == "head and loss: compiled (as the layers are)" and kernel is not losses_and_gradient
    kernel, choice = loss_kernel(torch.device("cuda"), False)
    assert choice.value == "PyTorch's operations" and "liger-kernel" in choice.reason
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    kernel, choice = loss_kernel(torch.device("cpu"), False)
    assert choice.value == "PyTorch's operations" and kernel is losses_and_gradient


if __name__ == "__main__":
    compare(frozen=False)
    compare(frozen=True)
    compare(frozen=False, smoothing=0.2)
    print("alike")


def test_a_routers_loss_counts_by_trained_tokens_and_not_at_all_in_a_placeholder():
    head = SimpleNamespace(neutral=[], auxiliary=0.5, positions=None, targets=None)

    def model(**inputs) -> SimpleNamespace:
        return SimpleNamespace(logits=torch.tensor(7.0), aux_loss=torch.tensor(3.0))

    collator = PackedCollator()
    example = {"input_ids": [1, 2, 3, 4], "labels": [-100, -100, 3, 4]}
    assert loss.summed_loss(model, head, collator([example])) == 7 + 0.5 * 3 * 2
    assert loss.summed_loss(model, head, collator([])) == 7

"""Liger's norm and MLP take the place of LLaMA's, with LLaMA's outputs and gradients. Its kernels need a GPU: on a CPU PyTorch stands in for them."""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from packed_models import largest_error, rows, small_llama

from sft.step.loss import summed_loss
from sft.step.modules import exchange
from sft.step.packed_rows import PackedCollator


def norm(hidden, weight, epsilon, offset, casting, in_place, row_mode):
    assert (offset, casting, in_place, row_mode) == (0.0, "llama", True, None)
    return F.rms_norm(hidden, weight.shape, weight, epsilon)


def test_the_model_computes_as_before(monkeypatch):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        pytest.importorskip("liger_kernel")
    else:
        stand_in = SimpleNamespace(LigerRMSNormFunction=SimpleNamespace(apply=norm))
        stand_in.LigerSiLUMulFunction = SimpleNamespace(apply=lambda gate, up: F.silu(gate) * up)
        for name, module in {"liger_kernel": SimpleNamespace(ops=stand_in), "liger_kernel.ops": stand_in}.items():
            monkeypatch.setitem(sys.modules, name, module)
        monkeypatch.delitem(sys.modules, "sft.step.liger_modules", raising=False)
    batch, found = PackedCollator()(rows(4)), []
    batch = {name: value.to(device) if torch.is_tensor(value) else value for name, value in batch.items()}
    for liger in (False, True):
        model = small_llama(attn_implementation="per_example").to(device)
        head = exchange(model, liger=liger)
        loss = summed_loss(model, head, batch)
        loss.backward()
        found.append((loss.item(), {name: weight.grad for name, weight in model.named_parameters()}))
        kinds = {kind.__name__ for module in model.modules() for kind in type(module).__mro__}
        assert {"LigerNorm", "LigerMLP"} <= kinds if liger else not kinds & {"LigerNorm", "LigerMLP"}
    (stock_loss, stock), (loss, ours) = found
    assert loss == pytest.approx(stock_loss, rel=1e-5) and largest_error(ours, stock) < 1e-4

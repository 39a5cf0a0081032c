"""Weights cast once in each optimizer step: autocast's numbers, and never an old copy."""

import copy

import pytest
import torch
from packed_models import rows, small_llama
from saved_runs import flags_for
from saved_runs import train as train_script
from torch._dynamo.utils import counters

from sft.flags import parser
from sft.step import compiled_layers
from sft.step.loss import summed_loss
from sft.step.modules import CastLinear, labelled_head, labelled_layer
from sft.step.packed_rows import PackedCollator
from sft.step.weight_copies import Casts, keeps_casts


def prepared(with_casts: bool, **config) -> tuple:
    model = small_llama(attn_implementation="per_example", **config)
    head = labelled_head(model)
    labelled_layer(model)
    return model, head, Casts(model, head, torch.bfloat16) if with_casts else None


def micro_batch(model, head, examples: list[dict], bf16: bool = True) -> float:
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = summed_loss(model, head, PackedCollator()(examples))
    loss.backward()
    return loss.item()


def train(model, head, casts, fused: bool) -> tuple[list[float], dict]:
    """Four steps of two micro-batches."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
    losses = []
    for step in range(4):
        optimizer.zero_grad()
        losses += [micro_batch(model, head, rows(3, seed)) for seed in (step, 10 + step)]
        optimizer.step()
        if casts:
            casts.on_optimizer_step()
    return losses, {name: weight.detach().clone() for name, weight in model.named_parameters()}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_training_is_autocasts_own_with_one_cast_for_each_step(fused, tied):
    expected, weights = train(*prepared(False, tie_word_embeddings=tied), fused)
    model, head, casts = prepared(True, tie_word_embeddings=tied)
    assert sum(type(module) is CastLinear for module in model.modules()) == 3 * 7 and len(casts.layers) == 22
    found, found_weights = train(model, head, casts, fused)
    assert found == pytest.approx(expected, rel=1e-4) and casts.renewed == 4
    assert all(torch.allclose(found_weights[name], weights[name], atol=2e-3) for name in weights)
    assert max(expected) - min(expected) > 10, "a model that does not move would prove nothing"


def test_an_old_copy_would_be_seen(monkeypatch):
    expected, _ = train(*prepared(False), True)
    model, head, casts = prepared(True)
    casts.renew()
    monkeypatch.setattr(casts, "renew", lambda: None)
    found, _ = train(model, head, casts, True)
    assert found[:2] == pytest.approx(expected[:2], rel=1e-4) and found[2:] != pytest.approx(expected[2:], rel=1e-2)


def test_loaded_weights_are_cast_again():
    model, head, casts = prepared(True)
    other, other_head, _ = prepared(False)
    for weight in other.parameters():
        weight.data *= 1.5
    first = micro_batch(model, head, rows(3))
    model.load_state_dict(other.state_dict())
    again = micro_batch(model, head, rows(3))
    assert again == pytest.approx(micro_batch(other, other_head, rows(3)), rel=1e-4) and again != pytest.approx(first)
    assert casts.renewed == 2
    for weight in model.parameters():  # another place, the same version
        weight.data = weight.data * 1.5
    assert micro_batch(model, head, rows(3)) != pytest.approx(again) and casts.renewed == 3


def test_a_kernel_that_tells_torch_nothing_is_followed_by_a_cast():
    """As bitsandbytes' optimizers write."""
    model, head, casts = prepared(True)
    first = micro_batch(model, head, rows(3))
    for weight in model.parameters():
        weight.data.mul_(1.5)
    assert micro_batch(model, head, rows(3)) != pytest.approx(first, rel=1e-2), "norms and embedding have changed"
    assert casts.renewed == 1
    casts.on_optimizer_step()
    found = micro_batch(model, head, rows(3))
    plain = prepared(False)[:2]
    plain[0].load_state_dict(model.state_dict())
    assert casts.renewed == 2 and found == pytest.approx(micro_batch(*plain, rows(3)), rel=1e-4)


def test_without_autocast_the_float32_weights_are_used():
    model, _, casts = prepared(True)
    reference = copy.deepcopy(model)
    casts.renew()
    for layer in casts.layers:
        layer.copy.zero_()
    ids = rows(1)[0]["input_ids"][None]
    edges = torch.tensor([0, ids.shape[1]], dtype=torch.int32)
    with torch.no_grad():
        assert torch.equal(*(one(ids, cu_seq_lens_q=edges).logits for one in (model, reference)))


@pytest.mark.parametrize(
    ("more", "casts_of_a_run"),
    [
        ("", [5]),
        pytest.param("--gradient_checkpointing True", [], marks=pytest.mark.slow),
        pytest.param("--bf16 False", [], marks=pytest.mark.slow),
    ],
)
def test_a_run_casts_once_for_each_step(tiny_llama, questions_csv, tmp_path, more, casts_of_a_run):
    """Four steps of several micro-batches, and the proof of the saved model."""
    flags = f"--bf16 True --max_steps 4 --save_strategy no --tokens_per_micro_batch 50 {more}"
    run = train_script(*flags_for(tiny_llama, questions_csv, tmp_path / "out", *flags.split()))
    assert run.sampler.micro_batches >= 3
    found = [callback.renewed for callback in run.callback_handler.callbacks if isinstance(callback, Casts)]
    assert found == casts_of_a_run


@pytest.mark.parametrize(
    ("more", "keeps"),
    [
        ("", False),  # one micro-batch in a padded step: autocast casts once
        ("--gradient_accumulation_steps 2", True),
        ("--tokens_per_micro_batch 50", True),
        ("--gradient_accumulation_steps 2 --packing False", False),
        ("--gradient_accumulation_steps 2 --gradient_checkpointing True", False),
        ("--gradient_accumulation_steps 2 --torch_compile True", False),
    ],
)
def test_which_runs_keep_them(more, keeps):
    flags = ["--model_name_or_path", "m", "--data_path", "d", "--output_dir", "o", *more.split()]
    assert keeps_casts(parser().parse_known_args(flags)[0]) == keeps


@pytest.mark.slow
def test_compiled_layers_use_them_in_one_graph(monkeypatch):
    inputs, layer_pass = [], compiled_layers.LayerPass.__call__

    def look(self, graph):
        inputs.extend(node.meta["val"] for node in graph.find_nodes(op="placeholder"))
        layer_pass(self, graph)

    monkeypatch.setattr(compiled_layers.LayerPass, "__call__", look)
    model, head, _ = prepared(False, num_hidden_layers=4)
    model.config._attn_implementation = "sdpa"  # per_example asks for its lengths, which no graph can hold
    compiled_layers.keep_residual_in_compute_type(model)
    eager = copy.deepcopy(model)
    casts = Casts(model, head, torch.bfloat16)
    torch._dynamo.reset()
    counters.clear()
    compiled_layers.compile_layers(model)
    for seed in range(3):
        examples = rows(3, seed)
        loss, expected = micro_batch(model, head, examples), micro_batch(eager, labelled_head(eager), examples)
        assert loss == pytest.approx(expected, rel=1e-2)
    found, expected = (torch.cat([w.grad.flatten() for w in one.parameters()]) for one in (model, eager))
    assert (found - expected).norm() < 3e-2 * expected.norm() and casts.renewed == 1
    assert counters["stats"]["unique_graphs"] == 3, "one of the three layers, one of the last, and the norm's"
    copies = [
        tuple(value.shape) for value in inputs if getattr(value, "ndim", 0) == 2 and value.dtype == torch.bfloat16
    ]
    assert len(copies) == 14 and all(isinstance(size, int) for shape in copies for size in shape), "of one fixed shape"

"""The exchanged modules: the head gives the loss, the last layer works at labelled positions, others stay as they are."""

import pytest
import torch
import transformers
from packed_models import rows, small_llama
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from sft.step import attention, loss, modules  # noqa: F401  attention registers its kernels
from sft.step.loss import summed_loss
from sft.step.modules import LabelledLayer, exchange
from sft.step.packed_rows import PackedCollator


def config(**changes) -> LlamaConfig:
    shape = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return LlamaConfig(**(shape | {"num_attention_heads": 4, "num_key_value_heads": 2} | changes))


def test_a_head_of_another_kind_gives_the_same(monkeypatch):
    """An adapter on the output layer, or a bias: its own forward is used, a chunk at a time."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(config())
    ids = torch.randint(0, 64, (30,))
    batch = PackedCollator()(
        [{"input_ids": ids[:20], "labels": ids[:20].clone()}, {"input_ids": ids[20:], "labels": ids[20:].clone()}]
    )
    model.set_attn_implementation("per_example")
    head = modules.exchange(model)
    expected = loss.summed_loss(model, head, batch)
    expected.backward()
    wanted = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    head.bias = torch.nn.Parameter(torch.zeros(64))
    found = loss.summed_loss(model, head, batch)
    found.backward()
    torch.testing.assert_close(found, expected)
    for name, gradient in wanted.items():
        torch.testing.assert_close(dict(model.named_parameters())[name].grad, gradient)
    assert head.bias.grad.norm() > 0


def test_a_head_of_another_kind_smooths_and_bends_as_the_plain_one_does():
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    model = transformers.GraniteForCausalLM(transformers.GraniteConfig(vocab_size=64, logits_scaling=0.3, **shape))
    model.set_attn_implementation("per_example")
    ids = torch.randint(0, 64, (30,))
    batch = PackedCollator()([{"input_ids": ids, "labels": ids.clone()}])
    kernel, _ = loss.loss_kernel(torch.device("cpu"), False, smoothing=0.3)
    head = modules.exchange(model, kernel)
    expected = loss.summed_loss(model, head, batch)
    (wanted,) = torch.autograd.grad(expected, head.weight)
    head.bias = torch.nn.Parameter(torch.zeros(64))
    found = loss.summed_loss(model, head, batch)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, head.weight)[0], wanted)


def test_the_head_keeps_its_names_and_gives_logits_again():
    model = LlamaForCausalLM(config())
    names = list(model.state_dict())
    head = modules.exchange(model)
    assert modules.exchange(model) is head and list(model.state_dict()) == names
    assert model(input_ids=torch.arange(5)[None]).logits.shape == (1, 5, 64)


def test_logits_exist_at_labelled_positions_only():
    """A row of 2,000 tokens with 3 trained ones asks the head for 3 rows."""
    seen = []
    model = LlamaForCausalLM(config(max_position_embeddings=4096))
    model.set_attn_implementation("per_example")

    def kernel(logits, targets):
        seen.append(logits.shape)
        return loss.losses_and_gradient(logits, targets)

    head = modules.exchange(model, kernel)
    labels = torch.full((2000,), -100)
    labels[1500:1503] = 5
    loss.summed_loss(
        model, head, PackedCollator()([{"input_ids": torch.zeros(2000, dtype=torch.int64), "labels": labels}])
    ).backward()
    assert seen == [(3, 64)]


def loss_at_every_position(model, batch: dict) -> torch.Tensor:
    """The summed loss by the stock modules, from the logits of the whole row."""
    inputs = {name: value for name, value in batch.items() if not name.startswith("label")}
    logits = model(**inputs, use_cache=False).logits[0, batch["label_positions"]]
    return torch.nn.functional.cross_entropy(logits, batch["label_targets"], reduction="sum")


def test_the_last_mlp_works_at_labelled_positions_alone():
    model = small_llama(attn_implementation="per_example")
    batch = PackedCollator()(rows(4))
    widths = []
    for layer in model.model.layers:
        layer.mlp.register_forward_hook(lambda module, inputs, output: widths.append(output.shape[1]))
    everywhere = loss_at_every_position(model, batch)
    head = exchange(model)
    labelled = summed_loss(model, head, batch)
    tokens, trained = batch["input_ids"].shape[1], len(batch["label_positions"])
    assert trained < 0.8 * tokens and widths == [tokens] * 5 + [trained]
    assert labelled.item() == pytest.approx(everywhere.item(), rel=1e-6)
    other = {**batch, "label_positions": batch["label_positions"] - 1}
    assert summed_loss(model, head, other).item() != pytest.approx(everywhere.item(), rel=1e-3)


@pytest.mark.parametrize("layers", [1, 2, 3])
def test_a_model_of_which_few_layers_run(layers):
    """As the automatic budget's trials run it: the last of them may be the model's last, and may not."""
    model = small_llama(attn_implementation="per_example")
    model.config.num_hidden_layers = layers
    batch = PackedCollator()(rows(4))
    everywhere = loss_at_every_position(model, batch)
    assert summed_loss(model, exchange(model), batch).item() == pytest.approx(everywhere.item(), rel=1e-6)


def test_another_familys_last_layer_and_a_derived_one_stay_as_they_are():
    model = small_llama()
    model.model.layers[-1].__class__ = type("Derived", (LlamaDecoderLayer,), {})
    shape = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    other = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(vocab_size=211, **shape))
    for left in (model, other):
        exchange(left)
        assert not any(isinstance(module, LabelledLayer) for module in left.modules())

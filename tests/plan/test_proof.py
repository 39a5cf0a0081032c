"""Proof by behaviour: what computes right passes, and each property fails when it is broken on purpose."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from packed_models import rows, small_llama
from peft import LoraConfig, get_peft_model
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM
from transformers.trainer_pt_utils import LabelSmoother

from sft import IGNORE_INDEX
from sft.flags import parser
from sft.job import UserError
from sft.model import loading
from sft.plan import proof
from sft.plan.settle import packed_or_padded
from sft.step.attention import PER_EXAMPLE, per_example
from sft.step.loss import losses_and_gradient
from sft.step.modules import exchange
from sft.step.packed_rows import PackedCollator, group_by_prefix

SHAPE = {
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
SHAPE |= {"num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0}
ON_A_CPU = SimpleNamespace(device=torch.device("cpu"), bf16=False, fp16=False, deepspeed=None)
LENGTHS = torch.tensor([60])  # of examples
ON_A_CPU.per_device_train_batch_size = 2


def proved(kind: str, kernel: str | None = PER_EXAMPLE, **config) -> proof.Proof:
    model_args = SimpleNamespace(model_name_or_path=None, trust_remote_code=False)
    made = AutoConfig.for_model(kind, **(SHAPE | config))
    return proof.prove(model_args, ON_A_CPU, made, rows(3, seed=1), kernel)[-1]


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("llama", {}),
        ("qwen3", {"head_dim": 16}),
        ("granite", {"logits_scaling": 8.0}),  # logits divided after the head
        ("cohere", {"logit_scale": 0.0625}),  # and multiplied
        ("gemma2", {"head_dim": 16, "attn_logit_softcapping": None, "sliding_window": 512}),  # capped
        ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    ],
)
def test_what_people_fine_tune_is_packed(kind, config):
    found = proved(kind, **config)
    assert found.fault is None and found.loss < 1e-5 and found.gradient < 2e-4, found


@pytest.mark.parametrize(
    ("kind", "config", "fault"),
    [
        (
            "lfm2",
            {"layer_types": ["conv", "full_attention"]},
            "examples see each other",
        ),  # a convolution over the border
        ("bloom", {"n_layer": 2, "n_head": 4}, "examples see each other"),
        (
            "gemma2",
            {"head_dim": 16, "sliding_window": 512},
            "an example's loss is off",
        ),  # scores of attention are capped
    ],
)
def test_what_mixes_or_bends_is_seen_and_can_be_padded(kind, config, fault):
    assert proved(kind, **config).fault.startswith(fault)
    assert proved(kind, kernel=None, **config).fault is None


def test_a_logits_transformation_that_is_left_out_is_seen(monkeypatch):
    monkeypatch.setattr("sft.step.modules._with_the_models_logits", lambda model, kernel: (kernel, []))
    assert "does to its logits" in proved("granite", logits_scaling=8.0).fault


def way_of(model):
    examples = proof.beginnings(rows(3, seed=1), proof.TOKENS)
    return examples, proof.losses_alone(model, examples)


def large_weights() -> torch.nn.Module:
    model = small_llama(attn_implementation="sdpa").eval()
    for weight in model.parameters():
        weight.data *= 4 if weight.dim() > 1 else 1
    return model


@pytest.mark.parametrize("broken", ["borders", "gradient", "nan", None])
def test_each_property_fails_when_it_is_broken(broken):
    model = large_weights()
    examples, alone = way_of(model)
    model.set_attn_implementation(PER_EXAMPLE)

    def without_borders(batch: list[dict]) -> dict:
        row = PackedCollator()(batch)
        edges = torch.tensor([0, row["input_ids"].shape[1]], dtype=torch.int32)
        return row | {"cu_seq_lens_q": edges, "cu_seq_lens_k": edges}

    honest = proof.packed(model, exchange(model), without_borders if broken == "borders" else PackedCollator())

    def way(batch: list[dict], which: int) -> torch.Tensor:
        loss = honest(batch, which)
        if broken == "gradient":
            return loss.detach() + 0.5 * (loss - loss.detach())
        return loss * float("nan") if broken == "nan" and which == 1 else loss

    fault = proof.try_out(model, way, examples, alone).fault
    wanted = {"borders": "examples see each other", "gradient": "an example's gradient"}
    assert fault is None if broken is None else fault and wanted.get(broken, "") in fault


@pytest.mark.parametrize(
    ("name", "rounding", "passes", "fails"),
    [
        ("loss", 1e-5, 0.9e-5, 1.1e-5),
        ("loss", 2e-2, 1.9e-2, 2.1e-2),
        ("gradient", 1e-5, 1.9e-4, 2.1e-4),
        ("gradient", 2e-2, 3.9e-2, 4.1e-2),
        # nothing is rounded otherwise in these, but where experts' products have other sizes in 16 bits
        *((name, 1e-5, 0.9e-5, 1.1e-5) for name in ("isolation", "causality")),
        *((name, 2e-2, 0.9e-3, 1.1e-3) for name in ("isolation", "causality")),
    ],
)
def test_each_difference_is_a_fault_from_its_own_bound_on(name, rounding, passes, fails):
    none = dict.fromkeys(("loss", "gradient", "isolation", "causality"), 0.0)
    assert proof.Proof(**none | {name: passes}, rounding=rounding).fault is None
    assert proof.Proof(**none | {name: fails}, rounding=rounding).fault
    assert proof.Proof(**none | {name: float("nan")}, rounding=rounding).fault


def test_the_bound_is_the_compute_types():
    model = large_weights()
    examples, alone = way_of(model)
    assert proof.try_out(model, proof.padded(model, True), examples, alone).rounding == 1e-5
    with torch.autocast("cpu", torch.bfloat16):
        assert proof.try_out(model, proof.padded(model, True), examples, alone).rounding == 2e-2


def test_a_gradient_that_is_not_a_number_alone_is_a_fault():
    model = large_weights()
    examples, alone = way_of(model)
    alone[1] = (alone[1][0], float("nan"))

    def way(batch: list[dict], which: int) -> torch.Tensor:
        return proof.stock(model, batch, which)

    assert "an example's gradient" in proof.try_out(model, way, examples, alone).fault


def test_rows_of_three_tokens_are_proved_on():
    ids = torch.tensor([1, 5, 2])
    short = [{"input_ids": ids + n, "labels": torch.where(torch.arange(3) > 0, ids + n, -100)} for n in range(3)]
    model = large_weights()
    examples = proof.beginnings(short, proof.TOKENS)
    found = proof.try_out(model, proof.padded(model, True), examples, proof.losses_alone(model, examples))
    assert found.fault is None
    assert len(examples) == 3


def test_a_token_that_sees_later_ones_is_seen():
    model = large_weights()
    examples, alone = way_of(model)

    def way(batch: list[dict], which: int) -> torch.Tensor:
        seen = [one | {"input_ids": torch.cat([one["input_ids"][-1:], one["input_ids"][1:]])} for one in batch]
        return proof.stock(model, seen, which)

    assert "a token sees later ones" in proof.try_out(model, way, examples, alone).fault


def leaky(module, query, key, value, attention_mask, scaling, **kwargs):
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scaling, enable_gqa=True
    )
    return out.transpose(1, 2), None


def slightly_leaky(*args, **kwargs):
    """A thousandth of what comes out is the mean over all of the row so far, which only another example can notice."""
    out, _ = per_example(*args, **kwargs)
    return out + 1e-3 * out.cumsum(1) / torch.arange(1, out.shape[1] + 1)[:, None, None], None


@pytest.mark.parametrize(
    ("kind", "layers", "config", "tried"),
    [
        ("qwen3", 4, {"layer_types": ["full_attention", "full_attention", "sliding_attention", "full_attention"]}, 3),
        ("qwen3", 5, {"layer_types": ["full_attention"] * 5}, 2),
        ("qwen3", 1, {"layer_types": ["full_attention"]}, 1),
        ("qwen3_moe", 6, {"mlp_only_layers": [0, 1, 2], "num_experts": 2, "num_experts_per_tok": 1}, 4),  # dense first
        ("deepseek_v3", 6, {"first_k_dense_replace": 4, "n_routed_experts": 2, "n_group": 1, "topk_group": 1}, 5),
    ],
)
def test_a_layer_of_each_kind_is_tried(kind, layers, config, tried, monkeypatch):
    def stop(config, layers):
        raise RuntimeError(layers)

    monkeypatch.setattr(proof, "with_layers", stop)
    with pytest.raises(RuntimeError, match=f"^{tried}$"):
        proved(kind, num_hidden_layers=layers, sliding_window=8, **config)


def test_a_slight_leak_is_seen():
    AttentionInterface.register("slightly_leaky", slightly_leaky)
    found = proved("llama", kernel="slightly_leaky")
    assert found.fault.startswith("examples see each other") and found.isolation < 1e-2, found


def test_a_kernel_of_the_users_must_keep_examples_apart(tiny_llama):
    AttentionInterface.register("leaky", leaky)
    assert proved("llama", kernel="leaky").fault.startswith("examples see each other")
    args = parser().parse_known_args(["--use_cpu", "True", "--model_name_or_path", str(tiny_llama)])[0]
    args.device, dataset = torch.device("cpu"), rows(3, seed=1)
    for kernel in ("leaky", "flash_attention_2"):
        args.attn_implementation = kernel
        with pytest.raises(UserError, match=f"--attn_implementation {kernel} cannot be used with packing: .*"):
            packed_or_padded(args, args, loading.load_config(args), dataset, LENGTHS)
    args.attn_implementation = None
    assert packed_or_padded(args, args, loading.load_config(args), dataset, LENGTHS)[0].value == PER_EXAMPLE


def test_a_model_that_cannot_be_packed_is_padded_unless_packing_was_asked_for(tiny_llama, monkeypatch, capsys):
    args = parser().parse_known_args(["--use_cpu", "True", "--model_name_or_path", str(tiny_llama)])[0]
    args.device, config = torch.device("cpu"), AutoConfig.for_model("bloom", **SHAPE, n_layer=2, n_head=4)
    args.model_name_or_path = None  # of another architecture
    args.packing_asked = True
    with pytest.raises(UserError, match=r"--packing True: examples see each other .*the run is padded"):
        packed_or_padded(args, args, config, rows(3, seed=1), LENGTHS)
    args.packing_asked = False
    packed_or_padded(args, args, config, rows(3, seed=1), LENGTHS)
    assert (
        args.packing is False and "packing: off, this run is padded: examples see each other" in capsys.readouterr().out
    )
    monkeypatch.setattr(
        "sft.plan.proof.stock",
        lambda model, examples, which, **how: 2 * len(examples) * next(model.parameters()).sum(),
    )
    args.packing = True
    with pytest.raises(UserError, match="cannot be trained right here, not even padded"):
        packed_or_padded(args, args, config, rows(3, seed=1), LENGTHS)


def test_in_16_bits_a_mixtures_experts_may_be_others_when_another_example_changes():
    seen = {"loss": 0.0, "gradient": 0.0, "isolation": 2e-2, "causality": 0.0, "rounding": 5e-2}
    assert proof.Proof(**seen, mixture=True).fault is None
    assert proof.Proof(**seen).fault.startswith("examples see each other")
    assert proof.Proof(**seen | {"isolation": 6e-2}, mixture=True).fault.startswith("examples see each other")


@pytest.mark.parametrize(("trained", "kept"), [(0, False), (3, False), (4, True)])
def test_where_too_little_is_trained_all_of_the_last_half_is(trained, kept):
    ids = torch.arange(1, 13)
    labels = torch.where(torch.arange(12) >= 12 - trained, ids, IGNORE_INDEX)
    (one, *_) = proof.beginnings([{"input_ids": ids, "labels": labels}], proof.TOKENS)
    expected = labels if kept else torch.where(torch.arange(12) >= 6, ids, IGNORE_INDEX)
    assert torch.equal(one["labels"], expected) and torch.equal(one["input_ids"], ids)


def test_beginnings_have_something_trained_and_something_before_it():
    long_prompt = {"input_ids": torch.arange(200), "labels": torch.full((200,), IGNORE_INDEX)}
    (first, second) = proof.beginnings([long_prompt, rows(1)[0]], proof.TOKENS)
    assert len(first["input_ids"]) == proof.TOKENS and (first["labels"] != IGNORE_INDEX).sum() == proof.TOKENS // 2
    assert (second["labels"] != IGNORE_INDEX).any() and (second["labels"] == IGNORE_INDEX).any()


def test_the_routers_loss_is_added_by_its_share_of_trained_tokens():
    from sft.step.loss import summed_loss

    torch.manual_seed(0)
    config = AutoConfig.for_model("mixtral", **SHAPE, num_local_experts=4, num_experts_per_tok=2, sliding_window=None,
                                  output_router_logits=True, router_aux_loss_coef=0.5, attn_implementation=PER_EXAMPLE)  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation=PER_EXAMPLE, dtype=torch.float32)
    head, batch = exchange(model), PackedCollator()(rows(3))
    with_it = summed_loss(model, head, batch)
    head.auxiliary = 0.0
    without = summed_loss(model, head, batch)
    trained = len(batch["label_targets"])
    assert 0.5 * trained < float(with_it - without) < 4 * 0.5 * trained  # a balanced router's loss is about its top-k


def test_a_routers_loss_with_another_weight_is_seen(monkeypatch):
    mixture = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None, "output_router_logits": True}
    assert proved("mixtral", router_aux_loss_coef=0.1, **mixture).fault is None
    monkeypatch.setattr(proof, "exchange", lambda model: swap_weight(exchange(model)))
    assert "an example's loss is off" in proved("mixtral", router_aux_loss_coef=0.1, **mixture).fault


def swap_weight(head):
    head.auxiliary = 0.0
    return head


# ---- with the weights as loaded


def loaded(folder, examples=None, kernel=PER_EXAMPLE, batch=2) -> list[proof.Proof]:
    model_args = SimpleNamespace(model_name_or_path=str(folder), cache_dir=None, trust_remote_code=False)
    config = AutoConfig.from_pretrained(folder)
    args = SimpleNamespace(**vars(ON_A_CPU) | {"per_device_train_batch_size": batch})
    return proof.prove(model_args, args, config, examples or rows(3, seed=1), kernel)


def test_the_first_layers_of_a_checkpoint_are_proved_on_whole_rows(tmp_path):
    small_llama().save_pretrained(tmp_path)  # of three layers
    ids = torch.arange(90) % 200
    found = loaded(tmp_path, [{"input_ids": ids + n, "labels": ids + n} for n in range(3)])
    assert [one.fault for one in found] == [None, None]
    assert [one.tokens for one in found] == [(proof.TOKENS,) * 3, (90,) * 3]
    assert [one.weights for one in found] == ["random weights", "the checkpoint's first 2 of 3 layers"]
    assert "rows of 64 to 90 tokens" in proof.in_a_line(found)
    layers = proof.loaded_layers(
        SimpleNamespace(model_name_or_path=str(tmp_path), cache_dir=None, trust_remote_code=False),
        ON_A_CPU,
        proof.with_layers(AutoConfig.from_pretrained(tmp_path), 2),
    )
    whole = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(weight, whole[name]) for name, weight in layers.state_dict().items())


def beside(model, shift: int) -> None:
    """Each token's embedding gets half of a neighbour's."""

    def mix(module, inputs, out):
        nothing = torch.zeros_like(out[:, :1])
        other = torch.cat([nothing, out[:, :-1]], 1) if shift > 0 else torch.cat([out[:, 1:], nothing], 1)
        return out + 0.5 * other

    model.get_input_embeddings().register_forward_hook(mix)


def scaled(model, of_loss: float = 1.0) -> None:
    """A factor that lies in a buffer; the loss's gradient may have another."""
    model.register_buffer("factor", torch.tensor(1.5))

    def scale(module, inputs, out):
        if out.dim():  # logits
            return out * (model.factor if of_loss == 1 else 1)
        return out if of_loss == 1 else out.detach() + of_loss * (out - out.detach())

    model.get_output_embeddings().register_forward_hook(scale)


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (lambda model: beside(model, 1), "examples see each other"),
        (lambda model: beside(model, -1), "a token sees later ones"),
        (scaled, "an example's loss is off"),
        (lambda model: scaled(model, 0.5), "an example's gradient is off"),
        (lambda model: None, None),
    ],
)
def test_each_property_fails_with_loaded_weights_when_it_is_broken(tmp_path, monkeypatch, spoil, fault):
    large_weights().save_pretrained(tmp_path)
    real = proof.loaded_layers

    def spoilt(*how):
        model = real(*how)
        spoil(model)
        return model

    monkeypatch.setattr(proof, "loaded_layers", spoilt)
    found = loaded(tmp_path)
    assert found[0].fault is None and len(found) == 2
    assert found[1].fault is None if fault is None else found[1].fault.startswith(fault)


def test_a_rope_that_depends_on_the_longest_row_is_seen_on_whole_rows(tmp_path, monkeypatch):
    """The beginnings of rows, 64 tokens, are shorter than the 80 at which it changes."""
    factors = {"short_factor": [1.0] * 6, "long_factor": [1.0 + i for i in range(6)], "factor": 2.0}
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 80, "rope_theta": 1e4} | factors
    model = small_llama(rope_parameters=rope, max_position_embeddings=160)
    model.save_pretrained(tmp_path)
    ids = torch.arange(100) * 7 % 200
    examples = [{"input_ids": ids[:size], "labels": ids[:size]} for size in (30, 40, 100)]
    assert [one.fault for one in loaded(tmp_path, examples)] == [None, None]
    together, apart = (loaded(tmp_path, examples, kernel=None, batch=size)[-1].fault for size in (2, 1))
    assert together.startswith("an example's loss is off") and apart is None
    monkeypatch.setattr("sft.step.modules.depends_on_length", lambda module: False)
    found = loaded(tmp_path, examples)
    assert found[0].fault is None and found[1].fault.startswith("an example's loss is off")


def test_the_longest_row_is_tried_too_and_cut_where_it_would_cost_too_much():
    class Rows(list):
        lengths = torch.tensor([10, 12, 14, 500, 16])

    ids = torch.arange(500) % 200
    data = Rows({"input_ids": ids[:size], "labels": ids[:size]} for size in Rows.lengths.tolist())
    assert [len(row["input_ids"]) for row in proof.first_rows(data, run_tokens=1e7)] == [10, 12, 500]
    assert [len(row["input_ids"]) for row in proof.first_rows(data, run_tokens=220_000)] == [10, 12, 100]
    assert [len(row["input_ids"]) for row in proof.first_rows(data, run_tokens=552)] == [10, 12, 64]


def test_a_fault_of_the_loaded_weights_alone_pads_the_run(tiny_llama, monkeypatch, capsys):
    args = parser().parse_known_args(["--use_cpu", "True", "--model_name_or_path", str(tiny_llama)])[0]
    args.device, real = torch.device("cpu"), proof.loaded_layers

    def spoilt(*how):
        model = real(*how)
        beside(model, 1)
        return model

    monkeypatch.setattr(proof, "loaded_layers", spoilt)
    args.packing_asked = False
    choice, found = packed_or_padded(args, args, loading.load_config(args), rows(3, seed=1), LENGTHS)
    said = capsys.readouterr().out
    assert args.packing is False and choice.value is None and found[-1].fault is None
    assert "examples see each other" in said and "with the checkpoint's first 2 of 2 layers" in said
    args.packing, args.packing_asked = True, True
    with pytest.raises(UserError, match="--packing True: examples see each other"):
        packed_or_padded(args, args, loading.load_config(args), rows(3, seed=1), LENGTHS)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named(tiny_llama, tmp_path, value, capsys):
    """An embedding that only the changed tokens have looked like a token that sees later ones."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    examples = rows(3, seed=1)
    last = max(int(one["input_ids"].max()) for one in examples)
    model.model.embed_tokens.weight.data[last] = value
    model.save_pretrained(tmp_path)
    args = parser().parse_known_args(["--use_cpu", "True", "--model_name_or_path", str(tmp_path)])[0]
    args.device = torch.device("cpu")
    with pytest.raises(UserError, match=r"1 of the weights hold NaN or infinity, such as model\.embed_tokens\.weight"):
        packed_or_padded(args, args, loading.load_config(args), examples, LENGTHS)
    assert capsys.readouterr().out == ""


# ---- the whole model, as it is in memory


def whole(model, packed=True, half=False, **how) -> proof.Proof:
    examples = proof.beginnings(rows(3, seed=1), proof.TOKENS)[: proof.WHOLE_EXAMPLES]
    head = exchange(model) if packed else None
    if packed:
        model.set_attn_implementation(PER_EXAMPLE)
    return proof.prove_whole(model, head, PackedCollator(group_by_prefix), examples, half, True, **how)


def with_adapters(model):
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5, task_type="CAUSAL_LM"))
    for name, weight in model.named_parameters():
        if "lora_B" in name:  # zeros at the start
            weight.data.normal_(0, 0.1)
    return model


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("packed", [True, False])
def test_the_whole_model_is_tried_and_stays_as_it_was(packed, adapters):
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    positions = 30 if packed else 256  # a padded run whose rows change such a rope is refused
    model = small_llama(rope_parameters=rope, max_position_embeddings=positions, attention_dropout=0.5)
    model = (with_adapters(model) if adapters else model).train()
    before = {
        name: value.clone() for name, value in [*model.named_parameters(), *model.named_buffers(remove_duplicate=False)]
    }
    drawn, config = torch.get_rng_state(), model.config.to_dict()
    if packed:
        model.set_attn_implementation(PER_EXAMPLE)
        config = model.config.to_dict()
    found = whole(model, packed)
    assert found.fault is None and found.weights == "the whole model" and len(found.tokens) == proof.WHOLE_EXAMPLES
    after = dict([*model.named_parameters(), *model.named_buffers(remove_duplicate=False)])
    assert before.keys() == after.keys() and all(torch.equal(value, after[name]) for name, value in before.items())
    assert torch.equal(drawn, torch.get_rng_state()) and model.config.to_dict() == config
    assert all(module.training for module in model.modules())
    assert all(weight.grad is None for weight in model.parameters())


def leak_in_the_last_adapter(model) -> None:
    """Behind the last attention only positions with a label are computed: examples meet there when several have labels."""
    adapter = model.base_model.model.model.layers[-1].mlp.down_proj.lora_A["default"]
    adapter.register_forward_hook(lambda module, inputs, out: out + out.cumsum(1))


@pytest.mark.parametrize(
    ("spoil", "fault"),
    [
        (lambda model: beside(model.base_model.model, 1), "examples see each other"),
        (lambda model: beside(model.base_model.model, -1), "a token sees later ones"),
        (leak_in_the_last_adapter, "an example's loss is off"),
        (lambda model: None, None),
    ],
)
def test_each_property_fails_in_the_whole_model_when_it_is_broken(spoil, fault):
    model = with_adapters(large_weights())
    spoil(model)
    found = whole(model)
    assert found.fault is None if fault is None else found.fault.startswith(fault)


def test_smoothed_labels_are_compared_with_transformers_own():
    smoother = LabelSmoother(0.3)
    model = small_llama()
    model.set_attn_implementation(PER_EXAMPLE)
    head = exchange(model, partial(losses_and_gradient, smoothing=0.3))
    examples = proof.beginnings(rows(3, seed=1), proof.TOKENS)[:2]
    how = model, head, PackedCollator(), examples, False, True
    assert proof.prove_whole(*how, partial(smoother, shift_labels=True)).fault is None
    assert "an example's loss is off" in proof.prove_whole(*how).fault


def test_what_is_known_by_heart_is_no_fault():
    """Of a loss of nearly nothing only rounding is left, which is large next to it."""
    model = large_weights()
    examples, alone = way_of(model)
    known = [(1e-5 * loss, 1e-5 * norm) for loss, norm in alone]

    def way(batch, which):
        return 1e-5 * proof.stock(model, batch, which) * (1 + 1e-3)

    assert proof.try_out(model, way, examples, known).fault is None
    assert proof.try_out(model, lambda batch, which: 1e5 * way(batch, which), examples, alone).fault


@pytest.mark.parametrize(
    ("parameters", "run_tokens", "device", "tried"),
    [(10**9, 1e5, "cpu", True), (10**9, 1e4, "cpu", False), (10**6, 100, "cpu", True), (10**10, 100, "cuda", True)],
)
def test_the_whole_model_is_tried_where_it_is_cheap(parameters, run_tokens, device, tried):
    class Rows(list):
        lengths = torch.tensor([70, 70, 70])

    data = Rows({"input_ids": torch.arange(70), "labels": torch.arange(70)} for _ in range(3))
    found = proof.rows_for_the_whole(data, parameters, run_tokens, device)
    assert [len(row["input_ids"]) for row in found] == [proof.TOKENS] * proof.WHOLE_EXAMPLES * tried


def test_weights_that_are_not_finite_in_a_later_layer_are_named():
    model = small_llama()
    model.model.layers[2].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(
        proof.NotFinite, match=r"the model in memory: 1 of the weights .* model\.layers\.2\.mlp\.down_proj"
    ):
        whole(model)

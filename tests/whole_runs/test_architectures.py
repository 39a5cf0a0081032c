"""Models that are not LLaMA, from a CSV to a saved and proved model."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from saved_runs import flags_for, train
from transformers import AutoConfig, AutoModelForCausalLM

SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
MIXTURE = {"num_key_value_heads": 2, "num_experts_per_tok": 2, "sliding_window": None, "output_router_logits": True}
MODELS = {  # the names of their weights are others in a file than in the model; and a name that a file has
    "mixtral": (MIXTURE | {"num_local_experts": 4, "router_aux_loss_coef": 0.5}, ".experts.3.w2.weight"),
    "qwen3_moe": (
        MIXTURE | {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8, "router_aux_loss_coef": 0.5},
        ".experts.3.down_proj.weight",
    ),
    "gpt_neox": ({}, "embed_out.weight"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_a_model_whose_names_change_is_trained_exported_and_proved(kind, tiny_llama, questions_csv, tmp_path):
    """One micro-batch of 8 examples: packed and padded, the router's loss is the mean over the same tokens."""
    config, name = MODELS[kind]
    base = AutoConfig.from_pretrained(tiny_llama)
    ends = {key: getattr(base, key) for key in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SHAPE | ends | config)).save_pretrained(folder)
    found = {}
    for packing in ("True", "False"):
        out = tmp_path / packing
        batch = ["--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "1", "--max_steps", "3"]
        train(*flags_for(folder, questions_csv, out, *batch, "--packing", packing))
        record = json.loads((out / "run_report.json").read_text())
        tried = [proof["weights"] for proof in record["proof"]["tried"]]
        assert tried == ["random weights", "the checkpoint's first 2 of 2 layers", "the whole model"]
        proved = json.loads((out / "COMPLETE.json").read_text())["proved"]
        assert "the reloaded model gives the trained model's logits" in proved[-1]
        with safe_open(out / "model.safetensors", "pt") as file:
            assert any(each.endswith(name) for each in file.keys())  # noqa: SIM118
        assert record["packing"]["micro_batches"] == 1 if packing == "True" else "packing" not in record
        found[packing] = [entry["loss"] for entry in record["log"]]
    assert found["True"] == pytest.approx(found["False"], rel=1e-5)
    if (
        "router_aux_loss_coef" in config
    ):  # of experts that are used alike the router's loss is the number of those that a token has
        assert found["True"][0] > 0.5 * 2 + 3

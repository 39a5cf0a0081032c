"""Loading: what is refused by the config alone, one reading of the config, models that stay whole, sizes of weights."""

import json
import types

import pytest
import torch
import transformers
from scripts import save_llama
from transformers import AutoConfig
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled, unset_hf_deepspeed_config

import utils
from sft.flags import ModelArguments, TrainingArguments
from sft.model import loading


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save_llama(path, vocab_size=64)
    return path


def flags(folder, wrap=(), targets=None):
    values = {"model_name_or_path": str(folder), "cache_dir": None, "trust_remote_code": False}
    values |= {
        "allow_new_weights": None,
        "fsdp_config": {"transformer_layer_cls_to_wrap": list(wrap)},
        "lora_target_modules": targets,
        "merge_lora": True,
    }
    return types.SimpleNamespace(**values)


def test_a_layer_that_the_model_lacks_is_refused_with_those_that_it_has(folder):
    assert loading.model_problems(flags(folder, ["LlamaDecoderLayer"], ["q_proj"])) == []
    assert loading.model_problems(flags(folder, ["GPTJBlock"], ["q_proj", "query"])) == [
        f"{folder} has no layer of class GPTJBlock, which FSDP should wrap. Its decoder layer: LlamaDecoderLayer.",
        "--lora_target_modules query: no linear layer of this model has that name. "
        "It has down_proj, gate_proj, k_proj, lm_head, o_proj, q_proj, up_proj, v_proj.",
    ]
    assert loading.model_problems(flags(folder, targets=["all-linear"])) == []
    assert len(loading.model_problems(flags(folder, targets=["proj"]))) == 1  # the end of a name is no name
    assert loading.model_problems(flags(folder, targets=["self_attn.q_proj"])) == []


def test_a_head_that_is_the_embedding_is_not_merged(folder, tmp_path):
    save_llama(tmp_path, vocab_size=64, tie_word_embeddings=True)
    assert loading.model_problems(flags(folder, targets=["q_proj", "lm_head"])) == []
    assert loading.model_problems(flags(tmp_path, targets=["q_proj", "lm_head"])) == [
        "--lora_target_modules lm_head with --merge_lora True: this model's head is its embedding too, and an addition to the "
        "head alone cannot be merged into it. Leave the head out, or remove --merge_lora."
    ]


def test_a_folder_without_a_model_is_refused(tmp_path):
    (problem,) = loading.model_problems(flags(tmp_path))
    assert problem.startswith(f"{tmp_path}: no config.json there.")
    save_llama(tmp_path, vocab_size=64)
    (tmp_path / "model.safetensors").unlink()
    (problem,) = loading.model_problems(flags(tmp_path))
    assert problem.startswith(f"{tmp_path}: a config.json but no weights (model.safetensors).")


def test_the_config_is_read_once_and_not_changed_by_the_checks(folder, monkeypatch):
    read, real = [], AutoConfig.from_pretrained
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda *a, **k: read.append(a) or real(*a, **k))
    loading._read_config.cache_clear()
    loading.model_problems(flags(folder))
    config = loading.load_config(ModelArguments(model_name_or_path=str(folder)))
    assert read == [(str(folder),)]
    assert config.to_dict() == real(folder).to_dict()


def test_models_stay_whole_where_zero_3_would_split_them(tmp_path):
    pytest.importorskip("deepspeed")
    (tmp_path / "zero3.json").write_text(json.dumps({"zero_optimization": {"stage": 3}, "train_batch_size": "auto"}))
    args = TrainingArguments(output_dir="out", use_cpu=True, deepspeed=str(tmp_path / "zero3.json"))
    try:
        assert is_deepspeed_zero3_enabled()
        with pytest.raises(RuntimeError, match="inside"), loading.whole_models(args):
            assert not is_deepspeed_zero3_enabled()
            raise RuntimeError("inside")
        assert is_deepspeed_zero3_enabled()
        with loading.whole_models(TrainingArguments(output_dir="out", use_cpu=True)):  # no DeepSpeed: untouched
            assert is_deepspeed_zero3_enabled()
    finally:
        unset_hf_deepspeed_config()


def test_rank_0_reads_for_the_others_where_accelerate_hands_the_shards_out(monkeypatch):
    def reads(version=2, efficient=True, ranks="2", four_bit=False, plugin=True) -> bool:
        monkeypatch.setenv("WORLD_SIZE", ranks)
        given = {"fsdp_version": version, "cpu_ram_efficient_loading": efficient} if plugin else None
        args = types.SimpleNamespace(fsdp_plugin_args=given)
        return loading.rank_0_reads(types.SimpleNamespace(load_in_4bit=four_bit), args)

    assert reads()
    others = [{"version": 1}, {"efficient": False}, {"ranks": "1"}, {"four_bit": True}, {"plugin": False}]
    assert not any(reads(**other) for other in others)


def test_sizes_of_weights_that_are_split_or_packed():
    weight = torch.zeros(3, 4)
    assert loading.numel(weight) == 12
    split = torch.zeros(0)
    split.ds_numel = 12
    packed = torch.zeros(6, 1, dtype=torch.uint8)
    packed.quant_state = types.SimpleNamespace(shape=torch.Size([3, 4]))
    assert loading.numel(split) == loading.numel(packed) == 12


def test_a_model_is_loaded_for_training(folder):
    model_args = ModelArguments(model_name_or_path=str(folder))
    args = TrainingArguments(output_dir="unused", use_cpu=True)
    settled = types.SimpleNamespace(
        attention=types.SimpleNamespace(value="sdpa"), config=loading.load_config(model_args)
    )
    model = utils.load_model(model_args, args, types.SimpleNamespace(pad_token_id=0), settled)
    assert model.config.use_cache is False  # nothing would read the keys and values that fill the memory
    assert model.config.pad_token_id == model.generation_config.pad_token_id == 0
    assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_liger_is_refused_for_a_model_that_it_has_no_kernels_for(tiny_llama, tmp_path):
    pytest.importorskip("liger_kernel")
    transformers.GPT2Config().save_pretrained(tmp_path)
    flags = {"use_liger_kernel": True, "use_cpu": False, "cache_dir": None, "trust_remote_code": False}
    refused, taken = (
        loading.liger_problems(types.SimpleNamespace(model_name_or_path=str(folder), **flags))
        for folder in (tmp_path, tiny_llama)
    )
    assert refused == ["--use_liger_kernel: Liger has no kernels for gpt2 models. Remove the flag."] and taken == []

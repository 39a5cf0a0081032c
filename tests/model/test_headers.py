"""A checkpoint is whole, by the headers of its files: each way in which it is not ends in one sentence, before a row is read."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from saved_runs import flags_for, train
from scripts import save_llama
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from sft.job import UserError
from sft.model import headers, loading


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("whole")
    save_llama(path, vocab_size=64)
    return path


def problems(folder, allow: str | None = None) -> list[str]:
    loading._read_config.cache_clear()
    flags = {"model_name_or_path": str(folder), "cache_dir": None, "trust_remote_code": False}
    return loading.model_problems(
        SimpleNamespace(**flags, fsdp_config=None, lora_target_modules=None, allow_new_weights=allow)
    )


def weights(change):
    def damage(folder) -> None:
        save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})

    return damage


def config(**values):
    def damage(folder) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    return damage


def file(change):
    return lambda folder: change(folder / "model.safetensors")


def cut(path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def half_of_a_pickle(path) -> None:
    torch.save(load_file(path), path.with_name("pytorch_model.bin"))
    path.unlink()
    cut(path.with_name("pytorch_model.bin"))


def lose_a_shard(path) -> None:
    held = load_file(path)
    homes = {name: f"model-0000{1 + number % 2}-of-00002.safetensors" for number, name in enumerate(held)}
    first = {name: held[name] for name in held if homes[name].startswith("model-00001")}
    save_file(first, path.with_name("model-00001-of-00002.safetensors"), {"format": "pt"})
    path.with_name("model.safetensors.index.json").write_text(json.dumps({"weight_map": homes}))
    path.unlink()


def without(name):
    return weights(lambda held: {key: weight for key, weight in held.items() if key != name})


def damaged_index(path) -> None:
    path.rename(path.with_name("model.safetensors.index.json")).write_text("{")


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (without("lm_head.weight"), "{}: 1 of the model's weights are not in the checkpoint, such as lm_head.weight; .*--allow_new_weights lm_head.weight"),
        (weights(lambda held: {f"_orig_mod.{key}": w for key, w in held.items()}), "{}: 21 of the model's weights .* torch.compile put _orig_mod"),
        (weights(lambda held: held | {"model.norm.bias": torch.ones(32)}), "{}: 1 weights of the checkpoint are not in .*, such as model.norm.bias"),
        (config(num_hidden_layers=1), "{}: 9 weights of the checkpoint .* such as model.layers.1.*num_hidden_layers"),
        (config(num_hidden_layers=3), "{}: 9 of the model's weights are not .* such as model.layers.2"),
        (config(vocab_size=60), r"{}: 2 weights have another shape .* \(64, 32\) in the checkpoint, \(60, 32\) by config.json"),
        (file(lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n")), "{}/model.safetensors is a Git LFS pointer"),
        (file(lambda path: path.with_name("tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\n")), "{}/tokenizer.json is a Git LFS pointer"),
        (file(cut), "{}/model.safetensors is damaged, or half of a file"),
        (file(half_of_a_pickle), "{}/pytorch_model.bin is damaged, or half of a file"),
        (file(lose_a_shard), "{}: 1 of its 2 files of weights are missing, such as model-00002-of-00002.safetensors"),
        (file(damaged_index), "{}: the index of its weights is damaged"),
        (file(lambda path: path.rename(path.with_name("consolidated.safetensors"))), "{}: .* the maker's own format"),
        (config(quantization_config={"quant_method": "bitsandbytes"}), r"{}: its weights are quantized \(bitsandbytes\).* --load_in_4bit True"),
        (config(quantization_config={"quant_method": "gptq", "bits": 4}), r"{}: its weights are quantized \(gptq\)"),
        (config(quantization_config={"quant_method": "awq", "bits": 4}), r"{}: its weights are quantized \(awq\)"),
        (config(model_type="t5"), "{}: t5 is an encoder-decoder"),
        (config(pad_token_id=64), "{}: config.json says pad_token_id 64, outside of the embedding's 64 rows"),
        (config(num_attention_heads=5), "{}: its config cannot be loaded: .* not a multiple of the number of attention heads"),
        (config(model_type="unheard-of"), "{}: its config cannot be loaded: .* model type `unheard-of`"),
        (config(hidden_act="unheard-of"), "{}: transformers makes no causal language model of its config.json"),
        (config(rope_parameters={"rope_type": "spiral", "rope_theta": 1e4}), "{}: .* the rope type 'spiral'.* It knows default, linear"),
    ],
)  # fmt: skip
def test_what_is_not_whole_ends_in_one_sentence(whole, tmp_path, damage, said):
    folder = shutil.copytree(whole, tmp_path / "model")
    assert problems(folder) == []
    damage(folder)
    (problem,) = problems(folder)
    assert "\n" not in problem
    with pytest.raises(UserError, match=said.format(folder)):
        raise UserError(problem)


def test_tied_heads_buffers_of_old_files_and_pickles_are_whole(tmp_path):
    save_llama(tmp_path, vocab_size=64, tie_word_embeddings=True)
    held = load_file(tmp_path / "model.safetensors")
    assert "lm_head.weight" not in held and problems(tmp_path) == []
    torch.save(held | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    assert problems(tmp_path) == []


def test_names_that_change_when_a_model_is_loaded_are_none_that_is_missing(tmp_path):
    shape = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    mixtral = AutoConfig.for_model("mixtral", **shape, num_key_value_heads=2, intermediate_size=48, num_local_experts=2)
    AutoModelForCausalLM.from_config(mixtral).save_pretrained(tmp_path)
    assert any(".experts.0." in name for name in load_file(tmp_path / "model.safetensors"))
    assert problems(tmp_path) == []


def test_new_weights_are_named(whole, questions_csv, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "model")
    without("lm_head.weight")(folder)
    assert problems(folder, "lm_head.weight") == []
    (problem,) = problems(folder, "lm_head.weight, model.norm.weight")
    assert problem.startswith("--allow_new_weights model.norm.weight: the checkpoint lacks no weight of that name.")
    # a download has no headers to be read before: it is judged when it is loaded
    args, made = SimpleNamespace(deepspeed=None, fsdp_plugin_args=None), LlamaConfig.from_pretrained(folder)
    flags = SimpleNamespace(model_name_or_path=str(folder), cache_dir=None, trust_remote_code=False, load_in_4bit=False)
    for allow in (None, "lm_head.weight"):
        flags.allow_new_weights = allow
        if allow:
            assert loading.load_weights(flags, args, made).lm_head.weight.std() > 0
        else:
            with pytest.raises(UserError, match="random numbers"):
                loading.load_weights(flags, args, made)


def test_what_the_hub_has_not_sent_yet_is_judged_later(whole, monkeypatch):
    flags = SimpleNamespace(model_name_or_path="someone/somewhere", cache_dir=None, allow_new_weights=None)
    assert headers.header_problems(flags, None, None) == []
    monkeypatch.setattr(headers, "try_to_load_from_cache", lambda *_: str(whole / "config.json"))
    made = LlamaConfig.from_pretrained(whole)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(made)
    assert headers.header_problems(flags, made, model) == []


@pytest.mark.parametrize("bars", [True, False])
def test_transformers_speaks_again_afterwards(bars):
    logging = transformers.utils.logging
    before = logging.is_progress_bar_enabled(), logging.get_verbosity()
    (logging.enable_progress_bar if bars else logging.disable_progress_bar)()
    try:
        with pytest.raises(KeyError), headers.quiet():
            assert not logging.is_progress_bar_enabled() and logging.get_verbosity() == logging.ERROR
            raise KeyError
        assert (logging.is_progress_bar_enabled(), logging.get_verbosity()) == (bars, before[1])
    finally:
        (logging.enable_progress_bar if before[0] else logging.disable_progress_bar)()


def test_a_run_says_so_before_a_row_is_read(tiny_llama, questions_csv, tmp_path):
    folder = shutil.copytree(tiny_llama, tmp_path / "model")
    without("lm_head.weight")(folder)
    with pytest.raises(UserError, match="random numbers"):
        train(*flags_for(folder, questions_csv, tmp_path / "out", "--data_path", str(tmp_path / "no.csv")))
    assert not (tmp_path / "out").exists()

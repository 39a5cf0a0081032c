"""LoRA: which flags are refused, what is trained, and that a merged model is base + adapter."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from scripts import save_llama
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from sft import merge_lora
from sft.flags import ModelArguments, TrainingArguments, parser
from sft.job import UserError, swapped
from sft.model import lora

peft = pytest.importorskip("peft")


def flags(*argv: str):
    return parser().parse_known_args(["--output_dir", "out", *argv])[0]


@pytest.fixture
def base(tmp_path):
    save_llama(tmp_path / "base", vocab_size=64)
    return tmp_path / "base"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--lora_r", "8"], "--lora_r: set, but LoRA is off. Add --use_lora True."),
        (
            ["--lora_target_modules", "q_proj", "--merge_lora", "True"],
            "--lora_target_modules, --merge_lora: set, but LoRA is off. Add --use_lora True.",
        ),
        (["--use_lora", "True", "--lora_r", "0"], "--lora_r 0: a rank is at least 1."),
        (["--use_lora", "True", "--lora_dropout", "1"], "--lora_dropout 1.0: it lies between 0 and 1."),
        (["--use_lora", "True", "--lora_dropout", "-0.1"], "--lora_dropout -0.1: it lies between 0 and 1."),
        (["--use_lora", "True", "--lora_dropout", "0"], None),
        (
            ["--use_lora", "True", "--load_in_4bit", "True"],
            "--load_in_4bit needs a CUDA GPU and none was found. Remove the flag: LoRA alone runs here.",
        ),
        (["--use_lora", "True"], None),
        ([], None),
    ],
)
def test_flags_that_contradict_each_other(argv, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert lora.lora_problems(flags(*argv)) == ([message] if message else [])


def test_activation_checkpointing_through_fsdp_is_refused():
    parsed = flags("--use_lora", "True")
    parsed.fsdp_config = {"activation_checkpointing": True}
    assert lora.lora_problems(parsed) == [
        '--use_lora with "activation_checkpointing" in --fsdp_config: peft (0.21) would save an empty adapter. '
        "Use --gradient_checkpointing True instead."
    ]


def trained_adapter(base, folder, **model_flags):
    """Train every addition a little and save the adapter as a run does."""
    model_args = ModelArguments(model_name_or_path=str(base), use_lora=True, **model_flags)
    training_args = TrainingArguments(output_dir=str(folder), use_cpu=True)
    options = lora.load_options(model_args, training_args)
    model = lora.add_adapters(AutoModelForCausalLM.from_pretrained(base, **options), model_args, training_args)
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    model.save_pretrained(folder)
    lora.record_base(folder, model_args)
    return model.eval()


def test_additions_are_trained_in_float32_and_nothing_else_is(base, tmp_path, capsys):
    model = trained_adapter(base, tmp_path / "adapter", lora_r=4, lora_target_modules=["q_proj", "v_proj"])
    # two layers, each: q 32 -> 4 -> 32, v 32 -> 4 -> 16
    assert "LoRA: rank 4, alpha 8, dropout 0.05 on q_proj, v_proj: 896 of" in capsys.readouterr().out
    on = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert sum(parameter.numel() for parameter in on.values()) == 2 * (32 * 4 + 4 * 32 + 32 * 4 + 4 * 16) == 896
    assert all("lora_" in name and parameter.dtype == torch.float32 for name, parameter in on.items())


@pytest.mark.parametrize("recomputes", [True, False])
def test_recomputed_layers_have_an_input_with_a_gradient(base, recomputes):
    model_args = ModelArguments(model_name_or_path=str(base), use_lora=True)
    args = TrainingArguments(output_dir="out", use_cpu=True, gradient_checkpointing=recomputes)
    model = lora.add_adapters(AutoModelForCausalLM.from_pretrained(base), model_args, args)
    assert model.get_input_embeddings()(torch.tensor([[1]])).requires_grad is recomputes


def test_frozen_weights_are_held_in_the_compute_type(base):
    bf16 = TrainingArguments(output_dir="out", use_cpu=True, bf16=True)
    options = lora.load_options(ModelArguments(use_lora=True), bf16)
    assert options == {"dtype": torch.bfloat16}
    model_args = ModelArguments(model_name_or_path=str(base), use_lora=True)
    model = lora.add_adapters(AutoModelForCausalLM.from_pretrained(base, **options), model_args, bf16)
    assert {parameter.dtype for parameter in model.parameters() if not parameter.requires_grad} == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters() if parameter.requires_grad} == {torch.float32}


def test_a_merged_model_is_base_plus_adapter(base, tmp_path):
    adapter, merged = tmp_path / "adapter", tmp_path / "merged"
    tuned = trained_adapter(base, adapter)
    (adapter / "prompt_template.txt").write_text("{instruction}")

    assert merge_lora.merge(str(adapter), str(merged)) < 1e-5
    ids = torch.arange(20)[None]
    plain = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    untuned = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.testing.assert_close(plain(ids).logits, tuned(input_ids=ids).logits, atol=1e-5, rtol=1e-4)
    assert (untuned(ids).logits - plain(ids).logits).abs().max() > 0.01, "the adapter changes nothing: no proof"
    assert (merged / "prompt_template.txt").read_text() == "{instruction}"
    assert load_file(merged / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()
    merge_lora.merge(str(adapter), str(tmp_path / "half"), dtype=torch.bfloat16)
    half = load_file(tmp_path / "half" / "model.safetensors")
    assert {weight.dtype for weight in half.values()} == {torch.bfloat16}


def interrupt(*_, **__):
    raise KeyboardInterrupt


def test_a_merged_model_has_all_that_an_export_has(watched_adapter, tmp_path, capsys):
    adapter, merged = watched_adapter.folder, tmp_path / "merged"
    merge_lora.main(["--adapter", str(adapter), "--output", str(merged)])
    assert "merged: " in capsys.readouterr().out
    before = (merged / "COMPLETE.json").read_text()
    with pytest.raises(KeyboardInterrupt), swapped(LlamaForCausalLM, save_pretrained=interrupt):
        merge_lora.merge(str(adapter), str(merged))
    assert not (merged / "COMPLETE.json").exists(), "it claims a model that is no longer there"
    (merged / "COMPLETE.json").write_text(before)
    made = {path.name: path.stat().st_mode & 0o777 for path in merged.iterdir()}
    assert len(set(made.values())) == 1, made
    assert made.keys() >= {"chat_template.jinja", "prompt_template.txt", "tokenizer.model", "Modelfile"}
    assert (merged / "run_report.json").read_bytes() == (adapter / "run_report.json").read_bytes()
    inside = shutil.copytree(adapter, tmp_path / "run") / "adapter"  # as --merge_lora True leaves it
    shutil.copytree(adapter, inside, ignore=shutil.ignore_patterns("run_report.json"))
    (merged / "README.md").unlink()
    merge_lora.claim(inside, merged, "equal")
    card = (merged / "README.md").read_text()
    assert (
        "library_name: transformers\n" in card
        and "\nvllm serve ./merged\n" in card
        and "\nA LoRA fine-tune, merged, of `" in card
    )
    assert json.loads((merged / "COMPLETE.json").read_text())["step"] == 3
    config, generation = (json.loads((merged / f"{name}.json").read_text()) for name in ("config", "generation_config"))
    assert (config["dtype"], config["rope_theta"], config["pad_token_id"]) == ("bfloat16", 10000.0, 0)
    assert (generation["eos_token_id"], generation["pad_token_id"]) == (2, 0)


def test_without_peft_merging_is_one_message(tmp_path, monkeypatch):
    monkeypatch.setattr(merge_lora.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="merging needs the package peft"):
        merge_lora.merge(str(tmp_path), str(tmp_path / "merged"))


def test_a_merge_that_is_not_a_number_is_not_saved(base, tmp_path):
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    trained_adapter(base, tmp_path / "adapter")
    with pytest.raises(RuntimeError, match="by nan of the logits: not saved"):
        merge_lora.merge(str(tmp_path / "adapter"), str(tmp_path / "merged"))
    assert not (tmp_path / "merged").exists()


def test_a_merge_is_no_rank_of_the_job(base, tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(lora.subprocess, "run", lambda command, env, check: ran.append((command, env)))
    (tmp_path / "adapter").mkdir()
    of_the_job = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2", "ACCELERATE_USE_FSDP": "true"}
    for name, value in (of_the_job | {"ACCELERATE_USE_DEEPSPEED": "true", "HF_HOME": "/there"}).items():
        monkeypatch.setenv(name, value)
    for merge in (False, True):
        model_args = ModelArguments(model_name_or_path=str(base), use_lora=True, merge_lora=merge, cache_dir="/cache")
        lora.finish_adapter(tmp_path / "adapter", tmp_path / "out", model_args, torch.bfloat16)
    ((command, environment),) = ran
    assert command[-4:] == ["--save_dtype", "bfloat16", "--cache_dir", "/cache"]
    assert environment["HF_HOME"] == "/there" and not {*of_the_job, "ACCELERATE_USE_DEEPSPEED"} & environment.keys()


def test_merging_onto_another_base_is_refused(base, tmp_path):
    adapter = tmp_path / "adapter"
    trained_adapter(base, adapter)
    other = tmp_path / "other"
    shutil.copytree(base, other)
    weights = load_file(other / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] += 0.01
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(UserError, match=f"{other} is not the model that this adapter was trained on"):
        merge_lora.merge(str(adapter), str(tmp_path / "merged"), base=str(other))
    assert not (tmp_path / "merged").exists()
    shutil.move(base, tmp_path / "moved")  # the same weights elsewhere, and in another type, are the same model
    AutoModelForCausalLM.from_pretrained(tmp_path / "moved", dtype=torch.bfloat16).save_pretrained(tmp_path / "half")
    merge_lora.merge(str(adapter), str(tmp_path / "merged"), base=str(tmp_path / "half"))


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"no adapter_config\.json there"):
        merge_lora.merge(str(tmp_path), str(tmp_path / "merged"))


def test_the_fingerprint_reads_old_pickled_checkpoints(base, tmp_path):
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    torch.save(load_file(base / "model.safetensors"), pickled / "pytorch_model.bin")
    assert lora.weights_digest(str(pickled)) == lora.weights_digest(str(base))
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        lora.weights_digest(str(tmp_path))


def test_the_fingerprint_is_the_same_of_one_file_and_of_several(base, tmp_path):
    weights, shards = load_file(base / "model.safetensors"), tmp_path / "shards"
    shards.mkdir()
    names = sorted(weights, reverse=True)  # the later names lie in the first file
    home = {name: f"model-0000{1 + 2 * place // len(names)}-of-00002.safetensors" for place, name in enumerate(names)}
    for file in set(home.values()):
        save_file({name: weights[name] for name in names if home[name] == file}, shards / file)
    (shards / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": home}))
    assert lora.weights_digest(str(shards)) == lora.weights_digest(str(base))


def test_the_command_line_ends_in_one_message(base, tmp_path, capsys):
    adapter = tmp_path / "adapter"
    trained_adapter(base, adapter)
    record = json.loads((adapter / lora.BASE_RECORD).read_text())
    assert record["model_name_or_path"] == str(base) and record["loaded_in_4bit"] is False
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        merge_lora.main(["--adapter", str(tmp_path), "--output", str(tmp_path / "merged")])
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}: no adapter_config.json there.")
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit) as ended:
        merge_lora.main(["--adapter", str(adapter), "--output", str(tmp_path / "file" / "merged")])
    printed = capsys.readouterr().err
    assert ended.value.code == 2 and "the merged model cannot be written there ([Errno 20] Not a directory" in printed
    # as the other commands name them
    merge_lora.main(["--model", str(adapter), "--output_dir", str(tmp_path / "merged"), "--save_dtype", "float32"])
    assert (
        f"merged: saved in {tmp_path / 'merged'}, as float32; logits differ from base + adapter by"
        in capsys.readouterr().out
    )


@pytest.mark.slow
def test_a_run_merges_wherever_it_was_started(base, tmp_path, monkeypatch):
    trained_adapter(base, tmp_path / "adapter")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")  # of the job whose rank 0 merges
    model_args = ModelArguments(model_name_or_path=str(base), use_lora=True, merge_lora=True)
    lora.finish_adapter(tmp_path / "adapter", tmp_path / "merged", model_args, torch.float32)
    assert load_file(tmp_path / "merged" / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()

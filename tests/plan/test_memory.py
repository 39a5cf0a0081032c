"""The memory plan: its bytes are counted on real layers, its sums are done by hand, and an out-of-memory becomes a sentence."""

import importlib.util
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import jobs
import pytest
import torch
from scripts import ROOT
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
)

import utils
from sft.data.llama_tokenizer import load_llama_tokenizer
from sft.flags import parser
from sft.job import UserError
from sft.plan import memory, memory_ladder, model_sizes
from sft.step import compiled_layers

GIB = 2**30
OPEN_LLAMA_7B = LlamaConfig(
    hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32, vocab_size=32000
)
OPEN_LLAMA_3B = LlamaConfig(
    hidden_size=3200, intermediate_size=8640, num_hidden_layers=26, num_attention_heads=32, vocab_size=32000
)


@pytest.fixture(autouse=True)
def installed(monkeypatch) -> set[str]:
    """Liger counts as installed only in a test that adds it."""
    stock, there = importlib.util.find_spec, set()

    def find_spec(name, *package):
        if name == "liger_kernel":
            return name if name in there else None
        return stock(name, *package)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    return there


def flags_for(model, csv, folder) -> list[str]:
    return ["--model_name_or_path", str(model), "--data_path", str(csv), "--output_dir", str(folder / "out")]


def flags(*argv: str):
    given = [
        "--model_name_or_path",
        "m",
        "--data_path",
        "d",
        "--output_dir",
        "o",
        "--bf16",
        "True",
        "--model_max_length",
        "1024",
        "--per_device_train_batch_size",
        "2",
        *argv,
    ]
    parsed = parser().parse_known_args([*given, "--plan_only", "True"])[0]
    parsed.fsdp_config = json.loads(parsed.fsdp_config) if parsed.fsdp_config else None
    return parsed


SHAPES: dict[tuple[str, str], model_sizes.Shape] = {}  # what a layer keeps is measured once for each


def measured(config, targets: list[str] | None) -> model_sizes.Shape:
    key = config.to_json_string(), str(targets)
    if key not in SHAPES:
        SHAPES[key] = model_sizes.Shape(config, targets)
    return SHAPES[key]


def plan_of(config, *argv: str, step_tokens: int | None = None) -> memory.Plan:
    parsed = flags("--plan_gpu_gib", "80", *argv)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory_ladder, "Shape", measured)
        return memory_ladder.plan(parsed, parsed, config, step_tokens)


def test_a_shape_is_the_models():
    shape = model_sizes.Shape(OPEN_LLAMA_7B)
    # the published size of LLaMA 7B; a layer has 4 h h + 3 h i weights and 2 h norms
    assert (
        shape.parameters == 6_738_415_616 == 32 * (4 * 4096**2 + 3 * 4096 * 11008 + 2 * 4096) + 2 * 32000 * 4096 + 4096
    )
    assert (shape.embedding, shape.head, shape.hidden) == (32000 * 4096, 32000 * 4096, 4096)
    assert shape.adapters == 32 * (4 * (4096 + 4096) + 3 * (4096 + 11008))
    assert model_sizes.Shape(OPEN_LLAMA_7B, ["q_proj", "v_proj"]).adapters == 32 * 2 * (4096 + 4096)


# ------------------------------------------------------------------------------------------------ activation bytes

TINY = {
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}
TOKENS = 128


def kept_bytes(
    layers: int,
    dtype: torch.dtype,
    autocast: bool,
    lora: bool = False,
    compiled: bool = False,
    padded: bool = False,
    **more,
) -> int:
    """Bytes that a model's forward pass keeps for backward, weights and their casts left out."""
    config = LlamaConfig(num_hidden_layers=layers, **TINY)
    model = LlamaForCausalLM(config).to(dtype)
    inner = model
    if lora:
        peft = pytest.importorskip("peft")
        inner = peft.get_peft_model(
            model, peft.LoraConfig(r=1, target_modules="all-linear", task_type="CAUSAL_LM", **more)
        )
        inner = inner.get_base_model()
    ids, mask = torch.randint(0, 64, (1, TOKENS)), None
    if padded:
        ids, mask = ids.view(2, -1), torch.ones(2, TOKENS // 2, dtype=torch.int64)
        mask[1, 50:] = 0
    else:
        compiled_layers.keep_residual_in_compute_type(inner)
    if compiled:
        compiled_layers.compile_layers(inner)
    inner.train()
    sizes = {tuple(p.shape) for p in model.parameters()}
    sizes |= {tuple(reversed(size)) for size in sizes}
    kept: dict[int, int] = {}
    tensors = []  # kept alive, so that no address is used twice

    def note(tensor: torch.Tensor) -> torch.Tensor:
        if tuple(tensor.shape) not in sizes:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            tensors.append(tensor)
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        inner.model(input_ids=ids, attention_mask=mask, use_cache=False)
    return sum(kept.values())


SHAPE = model_sizes.Shape(LlamaConfig(num_hidden_layers=2, **TINY))
H, INNER, Q, K = 256, 688, 256, 64


@pytest.mark.parametrize(
    ("half", "autocast", "padded", "by_hand"),
    [
        (True, True, False, 22 * H + 8 * INNER + 4 * Q + 4 * K),  # every cast of a norm's output is a copy of its own
        (True, False, False, 16 * H + 8 * INNER + 4 * Q + 4 * K),
        (False, False, False, 24 * H + 16 * INNER + 8 * Q + 8 * K),
        (True, True, True, 26 * H + 8 * INNER + 8 * Q),  # the residual stream in float32, keys and values for each head
        (True, False, True, 16 * H + 8 * INNER + 8 * Q),
        (False, False, True, 24 * H + 16 * INNER + 16 * Q),
    ],
)
def test_a_layer_keeps_the_bytes_that_are_counted_without_memory(half, autocast, padded, by_hand):
    planned = model_sizes.kept_by_a_layer(SHAPE, half, autocast, padded)
    # besides: two root mean squares of 4 bytes, a log-sum of 4 for each of 8 heads, the mask's row of 251 keys
    assert planned == pytest.approx(by_hand + 8 + 32 + padded * (2 if half else 4) * 251, abs=8)
    dtype = torch.bfloat16 if half and not autocast else torch.float32
    real = (kept_bytes(3, dtype, autocast, padded=padded) - kept_bytes(2, dtype, autocast, padded=padded)) / TOKENS
    assert 0 <= real - by_hand <= 8 + 32 + 14 * 2 + 4 * 64 * padded  # a mask of 64 keys


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"dtype": torch.bfloat16, "autocast": True, "lora": True}, ["--use_lora", "True", "--lora_r", "1", "--lora_dropout", "0"]),
        pytest.param({"dtype": torch.float32, "autocast": True, "compiled": True}, ["--compile_layers", "True"], marks=pytest.mark.slow),
    ],
)  # fmt: skip
def test_coefficients_of_compiled_layers_and_of_lora(how, words):
    real = (kept_bytes(3, **how) - kept_bytes(2, **how)) / TOKENS
    planned, _ = memory.activation_bytes(SHAPE, memory.Setting(vars(flags(*words))))
    assert planned == pytest.approx(real, rel=0.04)


@pytest.mark.parametrize("kind", [Qwen3Config, GPTNeoXConfig, GPT2Config])
def test_any_architecture_is_measured(kind):
    shape = model_sizes.Shape(kind(num_hidden_layers=3, vocab_size=1000))
    one, two = (model_sizes.kept_by_a_layer(shape, half, False, False) for half in (True, False))
    assert 20 * shape.hidden < one < two


def test_an_architecture_whose_layer_needs_numbers_has_no_plan(capsys):
    parsed = flags("--plan_gpu_gib", "80")
    config = FalconConfig(num_hidden_layers=2, vocab_size=1000)
    assert memory_ladder.plan(parsed, parsed, config) is None
    assert capsys.readouterr().out == "memory plan: none, a layer of FalconConfig cannot be measured without memory\n"


def test_lora_dropout_keeps_a_mask():
    # a GPU keeps one byte for each element (native_dropout), the CPU a float
    how = {"dtype": torch.bfloat16, "autocast": True, "lora": True}
    dropped = {**how, "lora_dropout": 0.1}
    masks = kept_bytes(3, **dropped) - kept_bytes(2, **dropped) - (kept_bytes(3, **how) - kept_bytes(2, **how))
    with_mask, without = (
        memory.activation_bytes(SHAPE, memory.Setting(vars(flags("--use_lora", "True", "--lora_dropout", rate))))[0]
        for rate in ("0.1", "0")
    )
    assert masks / TOKENS / 4 == with_mask - without == 5 * H + INNER + Q


# ----------------------------------------------------------------------------------------------------------- sums


def test_float32_training_takes_sixteen_bytes_for_each_parameter():
    plan = plan_of(OPEN_LLAMA_3B, "--tokens_per_micro_batch", "2048", step_tokens=4096)
    size = plan.shape.parameters
    assert [plan.gpu[part] / size for part in ("weights", "gradients", "optimizer")] == [4, 4, 8]
    assert plan.gpu["copies and gathers"] == 2 * 26 * (4 * 3200**2 + 3 * 3200 * 8640)  # autocast's bfloat16 layers
    layer = 22 * 3200 + 8 * 8640 + 8 * 3200 + 8 + 4 * 32  # 22 H + 8 I + 4 Q + 4 K, root mean squares and log-sums
    assert plan.gpu["activations"] == pytest.approx(2048 * (26 * layer + 16 * 3200), rel=1e-3)
    assert plan.host["loading or saving"] == 4 * size
    assert plan.fits and memory_ladder.describe(plan).count("\n") == 4


def test_one_micro_batch_per_step_needs_no_gradients_beside_activations():
    one = plan_of(OPEN_LLAMA_3B, "--tokens_per_micro_batch", "16384", step_tokens=16_384)
    many = plan_of(OPEN_LLAMA_3B, "--tokens_per_micro_batch", "16384", step_tokens=32_768)
    assert many.gpu_peak - one.gpu_peak == 4 * one.shape.parameters


def test_casts_are_gone_when_the_gradients_are_there():
    """With so few tokens the peak is at the end of the backward pass."""
    ask = "--per_device_train_batch_size", "1", "--model_max_length", "128", "--tokens_per_micro_batch", "128"
    assert plan_of(OPEN_LLAMA_3B, *ask, step_tokens=128).gpu["copies and gathers"] == 0


def test_micro_batches_are_planned_as_packing_makes_them():
    # 13,300 tokens with at most 4,096 in each: four of one size
    assert plan_of(OPEN_LLAMA_3B, "--tokens_per_micro_batch", "4096", step_tokens=13_300).tokens == 3325


def test_ranks_share_what_the_engine_shards():
    words = ["--tokens_per_micro_batch", "2048", "--plan_world_size", "4"]
    ddp = plan_of(OPEN_LLAMA_7B, *words)
    fsdp = plan_of(OPEN_LLAMA_7B, *words, "--fsdp", "true", "--fsdp_config", '{"cpu_ram_efficient_loading": true}')
    zero = plan_of(OPEN_LLAMA_7B, *words, "--deepspeed", str(ROOT / "ds_config.json"))
    size = ddp.shape.parameters
    assert ddp.gpu["weights"] == 4 * size and fsdp.gpu["weights"] == size and zero.gpu["weights"] == 2 * size
    assert ddp.gpu["optimizer"] == 8 * size and fsdp.gpu["optimizer"] == 2 * size and zero.gpu["optimizer"] == 0
    assert ddp.host["loading or saving"] == 4 * 4 * size, "each rank reads the model"
    # float32 weights, gathered on rank 0, and what is written of them: more than its reading of the model
    assert fsdp.host["loading or saving"] == (4 + 2) * size
    words += ["--use_lora", "True", "--fsdp", "true", "--fsdp_config"]
    once, each = (plan_of(OPEN_LLAMA_7B, *words, f'{{"cpu_ram_efficient_loading": {on}}}') for on in ("true", "false"))
    assert once.host["loading or saving"] == 2 * size and each.host["loading or saving"] == 4 * 2 * size
    assert zero.host["optimizer"] == 8 * size
    assert not ddp.fits and fsdp.fits and zero.fits


def deepspeed_file(folder: Path, **zero) -> str:
    """ds_config.json, edited."""
    file = json.loads((ROOT / "ds_config.json").read_text())
    file["zero_optimization"] |= zero
    (folder / "edited.json").write_text(json.dumps(file))
    return str(folder / "edited.json")


def test_ligers_chunks_are_smaller_and_compiled_layers_do_not_use_them(installed):
    ask = (OPEN_LLAMA_3B, "--tokens_per_micro_batch", "16384")
    eager, compiled = (plan_of(*ask, *more, step_tokens=16_384) for more in ([], ["--compile_layers", "True"]))
    installed.add("liger_kernel")
    liger, same = (plan_of(*ask, *more, step_tokens=16_384) for more in ([], ["--compile_layers", "True"]))
    head = 32_000 * 3_200
    assert eager.gpu["head and loss"] == (4 + 2) * head + 19 * 2**27, "gradient, cast, a chunk's logits"
    # now the most is when backward begins: the head's gradient, scaled, and what the last layer works with
    work = (liger.gpu["head and loss"] - 2 * 4 * head) / 16_384
    assert work == pytest.approx(memory.WORK * (22 * 3200 + 8 * 8640 + 8 * 3200), rel=0.01)
    assert compiled.gpu == same.gpu


def test_zero_2_with_offload_keeps_a_float32_sum_of_the_gradients_on_the_gpu(tmp_path):
    words = ["--gradient_checkpointing", "True", "--deepspeed"]
    asked = ["--tokens_per_micro_batch", "4096"]
    step = {"step_tokens": 13_669}
    plan = plan_of(OPEN_LLAMA_3B, *words, str(ROOT / "ds_config.json"), *asked, **step)
    size, embedding, bucket = plan.shape.parameters, 32000 * 3200, 3200**2
    larger = 26 * 3 * 3200 * 8640 + 2 * embedding  # than the bucket: the feed-forward layers, the embedding, the head
    assert plan.gpu["weights"] == 2 * size and plan.gpu["optimizer"] == 0
    # sums, gradients that stay until the end, three buckets
    assert plan.gpu["gradients"] == 4 * size + 2 * larger + 2 * 3 * bucket
    assert plan.host["gradients"] == 2**34, "float32, page-locked: 12.8 GiB in a block of 16"
    stage3 = plan_of(OPEN_LLAMA_3B, *words, deepspeed_file(tmp_path, stage=3), *asked, **step)
    assert stage3.host["gradients"] == 2 * 2**34 and stage3.gpu_peak < plan.gpu_peak, "its sums lie in the host too"
    roomy = plan_of(OPEN_LLAMA_3B, *words, deepspeed_file(tmp_path, reduce_bucket_size=2e8), *asked, **step)
    assert roomy.gpu["gradients"] in (4 * size, 4 * size + 2 * 3 * 2e8), "none is larger"
    assert roomy.gpu_peak < plan.gpu_peak
    alone = plan_of(OPEN_LLAMA_3B, *words, str(ROOT / "ds_config.json"), "--tokens_per_micro_batch", "13669", **step)
    assert alone.gpu["gradients"] == plan.gpu["gradients"] - 2 * larger, "the last micro-batch drops them one by one"
    halves = plan_of(
        OPEN_LLAMA_3B,
        *words,
        str(ROOT / "ds_config.json"),
        "--tokens_per_micro_batch",
        "1024",
        "--plan_world_size",
        "2",
        **step,
    )
    split = plan.gpu["gradients"] - halves.gpu["gradients"]
    assert split == (4 * size + 2 * larger) / 2


def test_deepspeed_joins_the_weights_at_the_start_and_holds_them_twice(tmp_path):
    file = Path(deepspeed_file(tmp_path))
    file.write_text(json.dumps(json.loads(file.read_text()) | {"data_types": {}}))
    words = ["--deepspeed", str(file), "--gradient_checkpointing", "True"]
    few, many = (
        plan_of(OPEN_LLAMA_3B, *words, "--tokens_per_micro_batch", str(tokens), step_tokens=tokens)
        for tokens in (4_096, 65_536)
    )
    assert few.gpu_peak == 2 * 2 * few.shape.parameters, "16-bit weights as they were loaded, and joined"
    assert many.gpu_peak > few.gpu_peak and many.gpu["activations"] > 0, "here training takes more"


def note_gradients() -> None:
    """In a run: note the bytes that DeepSpeed holds when a backward pass is over, before it drops the gradients."""
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    drop = DeepSpeedZeroOptimizer._clear_param_grad_only

    def noted(self) -> None:
        held = [p.grad.untyped_storage() for group in self.bit16_groups for p in group if p.grad is not None]
        line = {
            "held": sum({storage.data_ptr(): storage.nbytes() for storage in held}.values()),
            "sums": sum(group.flat_partition.nbytes for group in self.averaged_gradients.values()),
        }
        with open(os.environ["NOTES"], "a") as file:
            print(json.dumps(line), file=file)
        drop(self)

    DeepSpeedZeroOptimizer._clear_param_grad_only = noted


@pytest.mark.slow
def test_deepspeed_holds_the_gradients_that_the_plan_counts(tiny_llama, questions_csv, tmp_path):
    pytest.importorskip("deepspeed")
    given = [*flags_for(tiny_llama, questions_csv, tmp_path), "--data_cache_dir", str(tmp_path / "cache")]
    given += ["--model_max_length", "64", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "8"]
    given += ["--max_steps", "1", "--save_strategy", "no", "--use_cpu", "True", "--bf16", "True"]
    given += ["--deepspeed", deepspeed_file(tmp_path, offload_optimizer={"device": "cpu"})]
    torchrun = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    jobs.run(given, 1, tmp_path / "log", note_gradients, **torchrun, NOTES=str(tmp_path / "notes"))
    *others, last = map(json.loads, (tmp_path / "notes").read_text().splitlines())
    config = LlamaConfig.from_pretrained(tiny_llama)
    shape = model_sizes.Shape(config)
    larger = 2 * 3 * 32 * 64 + 2 * 320 * 32  # than 32 x 32
    buckets = 2 * 2 * 32**2
    assert others and all(note == {"held": 2 * larger + buckets, "sums": 4 * shape.parameters} for note in others)
    assert last == others[0] | {"held": 0}
    words = ["--deepspeed", deepspeed_file(tmp_path)]
    several, one = (plan_of(config, *words, "--model_max_length", "64").at(1, count) for count in (2, 1))
    assert several.gpu["gradients"] - one.gpu["gradients"] == 2 * larger


@pytest.mark.parametrize(("stored", "words", "copied"), [
    (torch.bfloat16, ["--use_lora", "True"], 0),
    (torch.float16, ["--use_lora", "True"], 2),
    (None, ["--use_lora", "True"], 2),
    (torch.bfloat16, [], 4),
    (torch.float32, [], 2),  # what is saved
])  # fmt: skip
def test_weights_loaded_as_they_are_stored_take_no_host_memory(stored, words, copied):
    plan = plan_of(LlamaConfig(**OPEN_LLAMA_3B.to_dict() | {"dtype": stored}), *words)
    assert plan.host["loading or saving"] == copied * plan.shape.parameters


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").is_file(), reason="Linux counts it there")
def test_they_stay_in_the_file(tmp_path):
    model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **TINY | {"vocab_size": 64_000}, dtype=torch.bfloat16))
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    size = 2 * sum(p.numel() for p in model.parameters())

    def anonymous() -> int:
        return 1024 * int(re.search(r"Anonymous: +(\d+)", Path("/proc/self/smaps_rollup").read_text())[1])

    taken = {}
    for dtype in (torch.bfloat16, torch.float32):
        before = anonymous()
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
        taken[dtype] = (anonymous() - before) / size
        assert loaded.dtype == dtype
    assert taken[torch.bfloat16] < 0.3 and taken[torch.float32] > 1.5, taken


def test_auto_grows_to_what_the_card_has_room_for():
    roomy = plan_of(OPEN_LLAMA_3B, step_tokens=2500)
    assert roomy.tokens == 2500, "a whole step"
    tight = plan_of(OPEN_LLAMA_3B, step_tokens=500_000)
    assert 2048 < tight.tokens < 10_000 and tight.fits
    room = 80 * GIB * (1 - memory.SPARE) - memory.OUTSIDE - tight.gpu_peak
    assert 0 <= room < 100 * tight.token_bytes


def test_a_micro_batch_is_never_larger_than_indices_of_32_bits_allow():
    plan = plan_of(OPEN_LLAMA_3B, "--plan_gpu_gib", "8000", step_tokens=500_000)
    assert plan.fits and plan.tokens == 62_500 <= memory.LARGEST_BUDGET, "eight of one size"


@pytest.mark.parametrize(
    ("limit", "found"), [("max\n", 1000), ("600\n", 600), ("9223372036854771712\n", 1000), (None, 1000)]
)
def test_a_container_may_have_less_memory_than_its_machine(limit, found, tmp_path, monkeypatch):
    if limit:
        (tmp_path / "memory.max").write_text(limit)
    monkeypatch.setattr(memory, "Path", lambda _: tmp_path / "memory.max")
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: SimpleNamespace(total=1000))
    assert memory.host_memory() == found


def test_a_plan_fits_the_gpu_and_the_host_to_the_byte():
    plan = plan_of(OPEN_LLAMA_3B, "--tokens_per_micro_batch", "512")
    s, tokens = plan.setting, plan.tokens

    def fits(host: float = 0, gpu: float = 0) -> bool:
        s.host_there = plan.host_peak + host
        s.gpu_there = (plan.gpu_peak + gpu + memory.OUTSIDE) / (1 - memory.FRAGMENTS)
        return plan.at(tokens, 2 if plan.several else 1).fits

    assert fits() is fits(host=1, gpu=1) is True
    assert fits(host=-1) is fits(gpu=-64) is False


@pytest.mark.parametrize(
    ("argv", "verdict"),
    [
        (["--tokens_per_micro_batch", "6000"], "--tokens_per_micro_batch 3000"),
        (["--tokens_per_micro_batch", "512"], "it fits"),
        (["--packing", "False", "--per_device_train_batch_size", "4"], "--gradient_checkpointing True"),
    ],
)
def test_the_verdict_names_the_cheapest_change_that_fits(argv, verdict):
    plan = plan_of(OPEN_LLAMA_3B, *argv, step_tokens=60_000)
    assert verdict in memory_ladder.verdict(plan)
    if not plan.fits:
        assert any(changed.fits for _, changed in memory_ladder.cheaper_runs(plan))


def test_a_7b_model_fits_one_card_with_recomputation_and_an_8_bit_optimizer():
    plan = plan_of(OPEN_LLAMA_7B, step_tokens=13_000)
    assert plan.tokens == 1858 and not plan.fits, "seven micro-batches"
    rungs = dict(memory_ladder.cheaper_runs(plan))
    assert not rungs["--gradient_checkpointing True"].fits
    carried = rungs["--gradient_checkpointing True --optim adamw_bnb_8bit"]
    assert carried.fits and carried.tokens == 13_000, "a whole step in one micro-batch: no gradients beside activations"
    few = "--tokens_per_micro_batch", "2048", "--gradient_checkpointing", "True", "--optim", "adamw_bnb_8bit"
    assert not plan_of(OPEN_LLAMA_7B, *few, step_tokens=13_000).fits
    qlora = (
        "--gradient_checkpointing",
        "True",
        "--use_lora",
        "True",
        "--load_in_4bit",
        "True",
        "--tokens_per_micro_batch",
        "2048",
    )
    assert plan_of(OPEN_LLAMA_7B, *qlora).gpu_peak < 8 * GIB


@pytest.mark.parametrize(
    ("optim", "bytes_each"),
    [
        ("adamw_torch_fused", 8),
        ("adamw_bnb_8bit", 2.03125),
        ("adamw_torch_8bit", 2.03125),
        ("sgd", 0),
        ("lion_32bit", 4),
    ],
)
def test_optimizer_states(optim, bytes_each):
    assert memory.optimizer_bytes(optim, 1000, 0) == bytes_each * 1000
    assert memory.optimizer_bytes("adamw_bnb_8bit", 1000, 100) == 2.03125 * 900 + 8 * 100


# ------------------------------------------------------------------------------------------------------ as a user


def test_plan_only_needs_the_config_alone(tmp_path, capsys):
    OPEN_LLAMA_7B.save_pretrained(tmp_path)
    words = ["--model_name_or_path", str(tmp_path), "--bf16", "True", "--per_device_train_batch_size", "2"]
    words += [
        "--gradient_accumulation_steps",
        "8",
        "--model_max_length",
        "1024",
        "--plan_only",
        "True",
        "--plan_gpu_gib",
        "80",
    ]
    fsdp = ["--fsdp", "full_shard auto_wrap", "--fsdp_transformer_layer_cls_to_wrap", "LlamaDecoderLayer"]
    with pytest.raises(SystemExit) as ended:
        utils.train(load_llama_tokenizer, [*words, *fsdp, "--plan_world_size", "4"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "memory plan: 6.74 B parameters, 4 x 80.0 GiB GPU, FSDP\n" in said
    assert said[said.index("memory plan") :].count("\n") == 5 and "it fits" in said
    with pytest.raises(SystemExit):
        utils.train(
            load_llama_tokenizer, [*words, "--deepspeed", str(ROOT / "ds_config.json"), "--plan_world_size", "4"]
        )
    assert "4 x 80.0 GiB GPU, ZeRO stage 2, offloaded to the host" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        utils.train(load_llama_tokenizer, [*words, "--deepspeed", '{"zero_optimization": {"stage": 1}}'])
    assert "1 x 80.0 GiB GPU, ZeRO stage 1" in capsys.readouterr().out


def test_a_plan_of_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match="its config cannot be loaded"):
        utils.train(load_llama_tokenizer, ["--model_name_or_path", str(tmp_path), "--plan_only", "True"])
    with pytest.raises(UserError, match="Add --plan_only True"):
        utils.train(load_llama_tokenizer, ["--model_name_or_path", str(tmp_path), "--plan_gpu_gib", "80"])
    OPEN_LLAMA_7B.save_pretrained(tmp_path)
    words = ["--model_name_or_path", str(tmp_path), "--plan_only", "True", "--deepspeed"]
    for file, problem in (
        ("missing.json", "there is no such file"),
        ('{"zero_optimization": {"stage": "2"}}', "stage is"),
    ):
        with pytest.raises(UserError, match=problem):
            utils.train(load_llama_tokenizer, [*words, file])


def test_a_full_gpu_ends_in_a_sentence_and_exit_code_3(tiny_llama, questions_csv, tmp_path, monkeypatch, capsys):
    def full(*args):
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 79.18 GiB of which 1 GiB is free."
        )

    monkeypatch.setattr("sft.run.trainer.summed_loss", full)
    words = flags_for(tiny_llama, questions_csv, tmp_path)
    words += ["--data_cache_dir", str(tmp_path / "cache"), "--model_max_length", "64", "--save_strategy", "no"]
    with pytest.raises(SystemExit) as ended:
        utils.train(load_llama_tokenizer, [*words, "--per_device_train_batch_size", "4"])
    assert ended.value.code == 3
    said = capsys.readouterr()
    lines = said.err[said.err.index("error:") :].splitlines()
    assert lines[0] == "error: GPU memory is full (rank 0), in training. Tried to allocate 2.50 GiB."
    assert re.match(r"memory plan: 0\.0\d{3} B parameters, 1 process on the CPU, which holds the whole model", lines[1])
    assert "Traceback" not in said.err
    assert "memory plan:" in said.out, "the plan is said at the start too"


def test_the_sentence_says_where_the_run_was(capsys):
    with pytest.raises(SystemExit) as ended, memory_ladder.explain_out_of_memory(None, "load"):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has …")
    assert ended.value.code == 3
    sentence = "error: GPU memory is full (rank 0), while the model was loaded. Tried to allocate 2.50 GiB.\n"
    assert capsys.readouterr().err == sentence


def test_a_plan_is_printed_for_the_micro_batches_that_run():
    plan = plan_of(OPEN_LLAMA_3B, "--tokens_per_micro_batch", "2048", step_tokens=16_384)
    other = plan.at(4000, micro_batches=1)
    assert "micro-batches of up to 4,000 tokens (a whole step in one)" in "\n".join(other.table())
    assert other.record()["tokens_per_micro_batch"] == 4000 and other.gpu["weights"] == plan.gpu["weights"]


def test_the_sentence_names_what_to_try_next():
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has …")
    plan = plan_of(OPEN_LLAMA_3B, "--tokens_per_micro_batch", "4096", step_tokens=16_384)
    said = memory_ladder.describe_full(error, plan, "while the run was prepared")
    assert said.startswith(
        "error: GPU memory is full (rank 0), while the run was prepared. Tried to allocate 20.00 MiB.\nmemory plan:"
    )
    assert said.splitlines()[-1].startswith("  Try next: --tokens_per_micro_batch 2048 (planned: ")
    # a change that fits comes before a cheaper one that does not
    large = plan_of(OPEN_LLAMA_7B, step_tokens=13_000)
    (first, _), *_ = less = [
        run for run in memory_ladder.cheaper_runs(large) if run[1].gpu_peak < 0.95 * large.gpu_peak
    ]
    wanted = next(flags for flags, run in less if run.fits)
    assert first != wanted
    assert f"  Try next: {wanted} (planned: " in memory_ladder.describe_full(error, large, "in training")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--deepspeed", "missing.json"], "--deepspeed missing.json: there is no such file"),
        (["--deepspeed", "{broken}"], "{broken}, line 2, column 3: this is not JSON"),
        (["--deepspeed", "{text}"], 'zero_optimization.stage is "2": it must be one of the numbers'),
        (
            ["--use_lora", "True", "--lora_target_modules", "query"],
            "--lora_target_modules query: no linear layer of this model has that name. It has down_proj",
        ),
        (["--use_lora", "True", "--load_in_4bit", "True"], "--load_in_4bit needs a CUDA GPU"),
        (["--lora_r", "8"], "--lora_r: set, but LoRA is off"),
    ],
)
def test_bad_input_is_one_message_before_weights_load(words, message, tiny_llama, questions_csv, tmp_path, monkeypatch):
    pytest.importorskip("deepspeed")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(utils, "load_model", lambda *args: pytest.fail("the weights were loaded"))
    monkeypatch.setenv("RANK", "0")
    files = {"broken": tmp_path / "broken.json", "text": tmp_path / "text.json"}
    files["broken"].write_text("{\n  broken: 1\n}")
    files["text"].write_text('{"zero_optimization": {"stage": "2"}}')
    words = [word.replace("{broken}", str(files["broken"])).replace("{text}", str(files["text"])) for word in words]
    given = flags_for(tiny_llama, questions_csv, tmp_path)
    with pytest.raises(UserError) as refused:
        utils.train(load_llama_tokenizer, [*given, *words])
    assert len(refused.value.problems) == 1
    assert message.replace("{broken}", str(files["broken"])) in refused.value.problems[0]


@pytest.mark.slow
def test_the_script_says_it_once_and_exits_with_2(tiny_llama, questions_csv, tmp_path):
    given = flags_for(tiny_llama, questions_csv, tmp_path)
    said = jobs.run([*given, "--deepspeed", "missing.json", "--lora_r", "8"], 1, tmp_path / "log", expect=2)
    assert said.count("--deepspeed missing.json: there is no such file") == 1
    assert said.count("--lora_r: set, but LoRA is off") == 1
    assert "Traceback" not in said

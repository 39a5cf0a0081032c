"""DDP, ZeRO-2, ZeRO-3 and FSDP2 give one and the same training: losses, learning rates, steps, weights, resume.

Each run is the real training path in two ranks: forked on a CPU, the script under torchrun on a GPU, where one may be asked for
("alone"). The DeepSpeed file is the project's own, edited as a user edits it.
"""

import json
import math
import re
import shutil
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace

import four_bits_on_a_cpu
import fsdp_over_gloo
import jobs
import pytest
import torch
from safetensors.torch import load_file
from scripts import ROOT, run_script, save_llama
from transformers import AutoModelForCausalLM

from sft import merge_lora
from sft.model import loading
from sft.run.trainer import SupervisedTrainer

STEPS, HALFWAY = 12, 6
RECIPE = f"""
    --max_steps {STEPS} --learning_rate 5e-3 --lr_scheduler_type cosine --warmup_ratio 0.25 --logging_steps 1 --seed 3
    --model_max_length 64 --per_device_train_batch_size 2 --gradient_accumulation_steps 2 --evaluation_strategy no
    --save_strategy steps --save_steps {HALFWAY} --disable_tqdm True
""".split()
# warm-up over a quarter of the steps, then a cosine to zero; the Trainer logs the rate that a step was taken with
RATES = [5e-3 * step / 3 for step in range(3)] + [
    5e-3 * 0.5 * (1 + math.cos(math.pi * (step - 3) / 9)) for step in range(3, STEPS)
]


class Run:
    """What a finished run printed and left in its output folder."""

    def __init__(self, folder: Path, printed: str):
        self.folder, self.printed = folder, printed
        report = json.loads((folder / "run_report.json").read_text())
        self.losses = [entry["loss"] for entry in report["log"]]
        self.rates = [entry["learning_rate"] for entry in report["log"]]
        self.steps = report["final"]["steps"]

    @cached_property
    def model(self) -> Path:
        """The folder of the whole model, which an adapter is merged into if the run has not done so."""
        if not (self.folder / "adapter_config.json").is_file():
            return self.folder
        merge_lora.merge(str(self.folder), str(self.folder / "merged"), dtype=torch.bfloat16)
        return self.folder / "merged"

    @cached_property
    def weights(self) -> dict[str, torch.Tensor]:
        files = self.model.glob("*model.safetensors")
        return {name: weight for file in files for name, weight in load_file(file).items()}


def edited_deepspeed_file(folder: Path, stage: int, more: str = "") -> str:
    text = (ROOT / "ds_config.json").read_text()
    assert text.count('"stage": 2') == 1
    file = folder / f"stage{stage}{'-more' * bool(more)}.json"
    file.write_text(text.replace('"stage": 2', f'{more}"stage": {stage}'))
    return str(file)


def worse_later() -> None:
    """In a rank: each evaluation finds a larger loss than the one before, so that the checkpoint in the middle is the best."""
    real = SupervisedTrainer.evaluation_loop

    def evaluation_loop(self, *args, **kwargs):
        found = real(self, *args, **kwargs)
        found.metrics["eval_loss"] += self.state.global_step
        return found

    SupervisedTrainer.evaluation_loop = evaluation_loop


def worse_later_and_shard() -> None:
    worse_later()
    fsdp_over_gloo.prepare_rank()


def shares_its_gpu(words: list[str]) -> bool:
    """Whether both ranks of a run must share the one GPU of the machine: NCCL refuses that, gloo does not."""
    return "cuda" in words and "alone" not in words and torch.cuda.device_count() < 2


class Runs:
    """Runs of one model on one CSV, made when they are first asked for."""

    def __init__(self, model: Path, csv: Path, folder: Path):
        self.folder = folder
        self.flags = [
            "--model_name_or_path",
            str(model),
            "--data_path",
            str(csv),
            "--data_cache_dir",
            str(folder / "cache"),
        ]
        self.done: dict[str, Run] = {}

    def flags_of(self, name: str) -> list[str]:
        """ "zero3 lora" -> --deepspeed stage3.json --use_lora True ..."""
        words = name.split()
        flags = [] if "cuda" in words else ["--use_cpu", "True"]
        for stage in (2, 3):
            more = '"stage3_max_reuse_distance": 0, ' * ("ahead" in words)
            flags += ["--deepspeed", edited_deepspeed_file(self.folder, stage, more)] * (f"zero{stage}" in words)
        flags += ["--eval_split", "0.2", "--eval_steps", f"{HALFWAY}"] * ("evaluated" in words)
        flags += ["--eval_strategy", "steps"] * ("evaluated" in words)
        flags += ["--load_best_model_at_end", "True"] * ("best" in words)
        if "fsdp" in words:
            flags += ["--fsdp", "full_shard auto_wrap" + " offload" * ("offload" in words)]
            flags += ["--fsdp_transformer_layer_cls_to_wrap", "LlamaDecoderLayer"]
            config = {
                "gathered": {"state_dict_type": "FULL_STATE_DICT"},
                "recompute": {"activation_checkpointing": True},
            }
            asked = {key: value for word in words for key, value in config.get(word, {}).items()}
            flags += ["--fsdp_config", json.dumps(asked)] * bool(asked)
        flags += ["--bf16", "True"] * ("bf16" in words)
        flags += ["--packing", "False"] * ("padded" in words)
        # 48 examples have about 300 trained tokens, and bfloat16 holds only even numbers between 256 and 512
        flags += ["--per_device_train_batch_size", "12"] * ("many" in words)
        flags += ["--compile_layers", "True"] * ("compiled" in words)
        flags += ["--load_in_4bit", "True"] * ("4bit" in words)
        flags += ["--ddp_backend", "gloo"] * shares_its_gpu(words)
        flags += ["--gradient_accumulation_steps", "4"] * ("alone" in words)  # the same examples in each step
        flags += [
            "--use_lora",
            "True",
            "--lora_r",
            "4",
            "--lora_alpha",
            "8" if {"4bit", "16bit"} & set(words) else "64",  # "16bit" is what "4bit" is compared with, on wider layers
            "--lora_dropout",
            "0",
        ] * ("lora" in words)
        flags += ["--merge_lora", "True"] * ("merged" in words)
        return flags

    def get(self, name: str) -> Run:
        if name not in self.done:
            self.done[name] = self.run(name, self.folder / name.replace(" ", "-"))
        return self.done[name]

    def resume(self, name: str) -> Run:
        """Continue from the checkpoint in the middle, in a folder that holds nothing else."""
        middle = f"checkpoint-{HALFWAY}"
        output = self.folder / f"{name.replace(' ', '-')}-resumed"
        shutil.copytree(self.get(name).folder / middle, output / middle)
        return self.run(name, output, "--resume_from_checkpoint", "True")

    def run(self, name: str, output: Path, *more: str) -> Run:
        """FSDP over gloo, on a CPU or with two ranks on one GPU, needs a helping hand, and so do 4 bits on a CPU."""
        words = name.split()
        flags = [*self.flags, *RECIPE, *self.flags_of(name), "--output_dir", str(output), *more]
        if "cuda" in words:  # a forked process cannot use a GPU
            script, environment = "llama_training.py", {}
            if "fsdp" in words and shares_its_gpu(words):
                script, environment = "tests/support/fsdp_over_gloo.py", {"GATHER_BY_ITSELF": "CUDA"}
            printed = run_script(script, *flags, processes=1 if "alone" in words else 2, env=environment)
        else:
            prepare = fsdp_over_gloo.prepare_rank if "fsdp" in words else None
            prepare = four_bits_on_a_cpu.prepare_rank if "4bit" in words else prepare
            prepare = (worse_later_and_shard if "fsdp" in words else worse_later) if "best" in words else prepare
            environment = {"GATHER_BY_ITSELF": "CPU"} if "apart" in words else {}
            printed = jobs.run(flags, 2, Path(f"{output}.log"), prepare, **environment)
        return Run(output, printed)


@pytest.fixture(scope="module")
def runs(tiny_llama, questions_csv, tmp_path_factory) -> Runs:
    return Runs(tiny_llama, questions_csv, tmp_path_factory.mktemp("engines"))


@pytest.fixture(scope="module")
def wide_runs(tiny_llama, questions_csv, tmp_path_factory) -> Runs:
    """The same with layers of 128 inputs and more: bitsandbytes' (0.50) kernels for a CPU take 64 of them at a time."""
    folder = tmp_path_factory.mktemp("wide")
    model = shutil.copytree(tiny_llama, folder / "llama")
    save_llama(model, vocab_size=320, hidden_size=128, intermediate_size=256)
    return Runs(model, questions_csv, folder)


def assert_same_training(run: Run, reference: Run, rel: float, learned: float = 0.3) -> None:
    assert run.steps == reference.steps == STEPS
    assert run.rates == pytest.approx(RATES, rel=1e-6, abs=1e-12)
    assert run.losses == pytest.approx(reference.losses, rel=rel)
    assert run.losses[-1] < run.losses[0] - learned, "nothing was learned: the comparison proves nothing"


def assert_whole(run: Run, reference: Run, atol: float) -> None:
    """Every tensor is there, with the reference's shape, type and, nearly, values, and plain transformers reads them."""
    assert {n: (w.shape, w.dtype) for n, w in run.weights.items()} == {
        n: (w.shape, w.dtype) for n, w in reference.weights.items()
    }
    for name, weight in run.weights.items():
        assert weight.isfinite().all(), name
        torch.testing.assert_close(
            weight, reference.weights[name], rtol=0.02, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )
    loaded, unused = AutoModelForCausalLM.from_pretrained(run.model, output_loading_info=True)
    assert not any(unused.values()), unused
    assert loaded.dtype == run.weights["lm_head.weight"].dtype


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_deepspeed_trains_as_plain_data_parallel_does(runs, engine):
    pytest.importorskip("deepspeed")
    run, reference = runs.get(engine), runs.get("ddp")
    assert_same_training(run, reference, rel=1e-4)
    assert_whole(run, reference, atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero2", "zero3"])
def test_deepspeed_resumes_where_it_was(runs, engine):
    pytest.importorskip("deepspeed")
    resumed, whole = runs.resume(engine), runs.get(engine)
    assert resumed.losses == pytest.approx(whole.losses, rel=1e-5)
    assert resumed.rates == pytest.approx(RATES, rel=1e-6, abs=1e-12)
    for name, weight in resumed.weights.items():
        torch.testing.assert_close(weight, whole.weights[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_zero3_saves_after_an_evaluation_with_weights_that_it_fetches_ahead(runs):
    """A large model's weights are let go between forward and backward, and fetched ahead for a backward pass that never comes."""
    pytest.importorskip("deepspeed")
    run = runs.get("zero3 ahead evaluated")
    assert (run.folder / f"checkpoint-{HALFWAY}" / "manifest.json").is_file()
    assert "the reloaded model gives the trained model's logits" in run.printed


@pytest.mark.slow
def test_every_engine_takes_the_steps_of_one_rank(tmp_path, monkeypatch, capsys):
    """What `python benchmarks/engines.py` does with more ranks, and with bfloat16 and padded runs."""
    pytest.importorskip("deepspeed")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import engines

    flags = ["--ranks", "2", "--dtypes", "float32", "--engines", "ddp", "fsdp2", "zero-2", "zero-3"]
    code = engines.main([*flags, "--work_dir", str(tmp_path)])
    printed = capsys.readouterr().out
    assert code == 0 and "10 of 10 runs are as they must be" in printed, printed


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["fsdp", "zero2", "zero3"])
def test_the_best_checkpoint_is_exported_and_not_the_last_under_every_engine(runs, engine):
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
    run, reference = runs.get(f"{engine} evaluated best"), runs.get("ddp evaluated best")
    assert "the reloaded model gives the trained model's logits" in run.printed
    state = json.loads((run.folder / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())
    assert state["best_global_step"] == HALFWAY
    assert_whole(run, reference, atol=2e-4)
    last = runs.get("ddp evaluated").weights
    with pytest.raises(AssertionError):
        torch.testing.assert_close(run.weights["lm_head.weight"], last["lm_head.weight"], rtol=0.02, atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["zero2 bf16 lora", "zero3 bf16 lora merged"])
def test_lora_trains_the_same_additions_under_every_engine(runs, name):
    pytest.importorskip("deepspeed")
    pytest.importorskip("peft")
    run, reference = runs.get(name), runs.get("ddp bf16 lora")
    assert_same_training(run, reference, rel=0.005, learned=0.15)
    assert_whole(run, reference, atol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["zero2", "zero3", "fsdp"])
def test_qlora_trains_the_same_additions_under_every_engine_and_resumes(wide_runs, engine):
    for package in ("bitsandbytes", "peft") + ("deepspeed",) * engine.startswith("zero"):
        pytest.importorskip(package)
    name = f"{engine} bf16 lora 4bit"
    run, reference = wide_runs.get(name), wide_runs.get("ddp bf16 lora 4bit")
    assert_same_training(run, reference, rel=0.005, learned=0.15)
    assert_whole(run, reference, atol=0.02)
    assert run.losses[0] == pytest.approx(reference.losses[0], rel=1e-5)
    in_16_bits = wide_runs.get("ddp bf16 lora 16bit")
    assert run.losses[0] != pytest.approx(in_16_bits.losses[0], rel=1e-4), "4 bits lose something, or were not used"
    assert wide_runs.resume(name).losses == pytest.approx(run.losses, rel=1e-4)


def test_weights_are_handed_out_where_accelerate_does_so(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    fsdp2 = {"fsdp_version": 2, "cpu_ram_efficient_loading": True}

    def handed_out(plugin: dict | None, load_in_4bit: bool = False) -> bool:
        flags = SimpleNamespace(fsdp_plugin_args=plugin)
        return loading.rank_0_reads(SimpleNamespace(load_in_4bit=load_in_4bit), flags)

    assert handed_out(fsdp2)
    assert not handed_out(fsdp2, load_in_4bit=True)
    for other in (None, fsdp2 | {"cpu_ram_efficient_loading": False}, fsdp2 | {"fsdp_version": 1}):
        assert not handed_out(other)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not handed_out(fsdp2)


def assert_rank_0_alone_loaded(printed: str) -> None:
    held = dict(re.findall(r"rank (\d) holds (\d+) bytes of the model", printed))
    assert int(held["1"]) < 0.02 * int(held["0"]), held


@pytest.mark.slow
@pytest.mark.parametrize("how", ["fsdp", "fsdp offload recompute"])
def test_fsdp2_on_a_cpu_trains_and_saves_as_plain_data_parallel_does(runs, how):
    run, reference = runs.get(how), runs.get("ddp")
    printed = run.printed
    assert_rank_0_alone_loaded(printed)
    assert ("FSDP recomputes 2 layers" in printed) == ("recompute" in how)
    assert ("FSDP offloads" in printed) == ("offload" in how)
    assert "trial save: complete" in printed
    assert "the reloaded model gives the trained model's logits" in printed
    manifest = json.loads((run.folder / f"checkpoint-{HALFWAY}" / "manifest.json").read_text())
    assert manifest["run"]["engine"] == "FSDP"
    assert_same_training(run, reference, rel=1e-4)
    assert_whole(run, reference, atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize("checkpoints", ["", " gathered"])
def test_fsdp2_on_a_cpu_resumes_where_it_was(runs, checkpoints):
    resumed, whole = runs.resume(f"fsdp{checkpoints}"), runs.get(f"fsdp{checkpoints}")
    each_rank_wrote = list((whole.folder / f"checkpoint-{HALFWAY}").glob("*/__1_0.distcp"))
    assert bool(each_rank_wrote) == (not checkpoints)
    assert resumed.losses == pytest.approx(whole.losses, rel=1e-6)
    for name, weight in resumed.weights.items():
        torch.testing.assert_close(weight, whole.weights[name], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_fsdp2_does_not_round_the_number_of_tokens_that_a_padded_loss_is_divided_by(runs):
    padded, packed = runs.get("fsdp bf16 many padded"), runs.get("fsdp bf16 many")
    assert_same_training(padded, packed, rel=1e-3)


@pytest.mark.slow
def test_lora_trains_the_same_additions_under_fsdp2_on_a_cpu(runs):
    pytest.importorskip("peft")
    run, reference = runs.get("fsdp bf16 lora merged"), runs.get("ddp bf16 lora")
    assert_rank_0_alone_loaded(run.printed)
    assert "float32 weights, gradients (added up between GPUs in bfloat16) and optimizer state" in run.printed
    # as Accelerate sets FSDP2 up, the loss is rounded to 16 bits: 2e-3, and its gradient with it
    assert run.losses[0] == pytest.approx(reference.losses[0], rel=1e-5)
    assert_same_training(run, reference, rel=0.005, learned=0.15)
    assert_whole(run, reference, atol=0.02)
    adapter = run.folder / "adapter"
    card = (adapter / "README.md").read_text()
    assert "library_name: peft" in card and "More Information Needed" not in card, "peft's own card is blank"
    assert (adapter / "chat_template.jinja").read_bytes() == (run.folder / "chat_template.jinja").read_bytes()


@pytest.mark.slow
def test_tensors_gathered_by_themselves_are_the_gathered_tensors(runs):
    """What lets two ranks share a GPU over gloo, on a CPU, where torch's own way works too."""
    run, reference = runs.get("fsdp apart"), runs.get("fsdp")
    gathered = [re.findall(r"rank \d gathered (\d+) tensors", each.printed) for each in (run, reference)]
    all_of_them = str(2 * len(run.weights))  # the rehearsal and the export; no checkpoint gathers any
    assert gathered == [[all_of_them, all_of_them], ["0", "0"]]
    assert run.losses == reference.losses
    assert run.weights.keys() == reference.weights.keys()
    for name, weight in run.weights.items():
        assert torch.equal(weight, reference.weights[name]), name


needs_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="FSDP on a GPU")


@needs_a_gpu
@pytest.mark.slow
@pytest.mark.parametrize("how", ["fsdp", "fsdp offload", "fsdp recompute"])
@pytest.mark.parametrize("ranks", ["", " alone"])
def test_fsdp2_trains_as_plain_training_does(runs, how, ranks):
    # plain data parallel cannot share a GPU: Accelerate (1.15) gives DistributedDataParallel the rank as the GPU's number
    run, reference = runs.get(f"{how} cuda bf16{ranks}"), runs.get("ddp cuda bf16 alone")
    assert "trial save: complete" in run.printed
    assert_same_training(run, reference, rel=0.02)
    assert_whole(run, reference, atol=0.02)


@needs_a_gpu
@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp", "fsdp recompute", "ddp lora", "fsdp lora"])
def test_compiled_layers_train_as_eager_ones_do(runs, how):
    if "lora" in how:
        pytest.importorskip("peft")
    run, reference = runs.get(f"{how} cuda bf16 compiled alone"), runs.get(f"{how} cuda bf16 alone")
    assert "compiled layers: on (--compile_layers)" in run.printed
    assert "compiled layers: off" in reference.printed
    assert_same_training(run, reference, rel=0.02, learned=0.15)
    assert_whole(run, reference, atol=0.02)


@needs_a_gpu
@pytest.mark.slow
@pytest.mark.parametrize("ranks", ["", " alone"])
def test_fsdp2_resumes_where_it_was(runs, ranks):
    resumed, whole = runs.resume(f"fsdp cuda bf16{ranks}"), runs.get(f"fsdp cuda bf16{ranks}")
    assert resumed.losses == pytest.approx(whole.losses, rel=2e-3)
    assert resumed.rates == pytest.approx(RATES, rel=1e-6, abs=1e-12)


@needs_a_gpu
@pytest.mark.slow
@pytest.mark.parametrize("ranks", ["", " alone"])
def test_lora_trains_the_same_additions_under_fsdp2(runs, ranks):
    pytest.importorskip("peft")
    run, reference = runs.get(f"fsdp cuda bf16 lora{ranks}"), runs.get("ddp cuda bf16 lora alone")
    assert_same_training(run, reference, rel=0.02, learned=0.15)
    assert_whole(run, reference, atol=0.02)

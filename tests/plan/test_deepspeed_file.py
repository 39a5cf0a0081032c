"""The DeepSpeed linter: what it finds, what it lets pass, and that its list of keys is DeepSpeed's."""

import json
import os
import re
from pathlib import Path

import pytest
from torch.utils.file_baton import FileBaton

from sft.flags import parser
from sft.plan import deepspeed_file

pytest.importorskip("deepspeed")


@pytest.fixture(autouse=True)
def no_extensions(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))


REPOSITORY = Path(__file__).resolve().parent.parent.parent
OURS = json.loads((REPOSITORY / "ds_config.json").read_text())


def flags(*argv: str):
    return parser().parse_known_args(["--output_dir", "out", "--bf16", "True", *argv])[0]


def config(**changes) -> dict:
    """Our file with some of its `zero_optimization` keys changed (`None` removes one)."""
    zero = {**OURS["zero_optimization"], **changes}
    return {**OURS, "zero_optimization": {key: value for key, value in zero.items() if value is not None}}


def said(file, severity: str, *argv: str) -> list[str]:
    return [str(finding) for finding in deepspeed_file.lint(file, flags(*argv)) if finding.severity == severity]


def test_our_own_file_passes_at_stage_2_and_3():
    path = str(REPOSITORY / "ds_config.json")
    findings = deepspeed_file.lint(path, flags())
    assert [str(finding) for finding in findings] == [
        f"{path}: offload_param, stage3_prefetch_bucket_size, stage3_param_persistence_threshold, "
        'stage3_gather_16bit_weights_on_model_save: no effect at stage 2, they wait for "stage": 3.'
    ]
    assert findings[0].severity == "note"
    assert deepspeed_file.lint(config(stage=3), flags()) == []
    assert "scheduler" not in OURS and "optimizer" not in OURS


def test_a_run_without_deepspeed_has_nothing_to_say(capsys):
    assert deepspeed_file.check_deepspeed(flags()) == []
    assert capsys.readouterr().out == ""


def test_deepspeed_needs_torchrun(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    (problem,) = deepspeed_file.check_deepspeed(flags("--deepspeed", str(REPOSITORY / "ds_config.json")))
    assert problem == (
        "--deepspeed without torchrun: DeepSpeed finds no ranks. Start the script with: torchrun --nproc_per_node=1"
    )


def test_errors_are_returned_and_the_rest_is_printed(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    file = tmp_path / "ds.json"
    file.write_text(json.dumps({**OURS, "optimizer": {"type": "AdamW"}, "train_batch_size": 7}))
    problems = deepspeed_file.check_deepspeed(flags("--deepspeed", str(file)))
    assert problems == [
        f"{file}: 'train_batch_size' is 7, but 1 rank x 8 per device x 1 accumulation = 8: they contradict each other. "
        'Write "train_batch_size": "auto" and the flag decides'
    ]
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith(f"warning: {file}: the optimizer block (AdamW) overrides --optim adamw_torch")
    assert printed[1].startswith("note: ")


@pytest.mark.parametrize(
    "block", [{"type": "WarmupLR", "params": {"warmup_max_lr": "auto"}}, {"type": "WarmupDecayLR"}, {}]
)
def test_the_flags_alone_decide_the_schedule(block):
    """DeepSpeed's WarmupLR runs one step ahead of the printed rate, and other numbers than the flags' were a traceback."""
    (problem,) = said({**OURS, "scheduler": block}, "error")
    assert problem == (
        f"the DeepSpeed configuration: a scheduler block ({block.get('type', 'no type')}): the learning rate that is used "
        'would not be the one that is printed. Remove the block "scheduler": --lr_scheduler_type decides'
    )


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (config(cpu_offload=True), "'zero_optimization.cpu_offload': .* Write \"offload_optimizer\": {\"device\": \"cpu\"}$"),
        (config(cpu_offload_param=True), ".*Write \"offload_param\": {\"device\": \"cpu\"}$"),
        (config(cpu_offload_params=True), ".*Write \"offload_param\": {\"device\": \"cpu\"}$"),
        (config(cpu_offload_use_pin_memory=True), ".*Write \"pin_memory\": true in \"offload_optimizer\"$"),
        (config(stage3_gather_fp16_weights_on_model_save=True), ".*Write \"stage3_gather_16bit_weights_on_model_save\": true$"),
        ({**OURS, "bfloat16": {"enabled": True}}, "'bfloat16': .*Write \"bf16\": {\"enabled\": \"auto\"}$"),
        ({**OURS, "amp": {"enabled": True}}, "'amp': .*Write \"bf16\""),
        ({**OURS, "fp32_allreduce": True}, ".*Write \"communication_data_type\": \"fp32\"$"),
        ({**OURS, "allreduce_always_fp32": True}, ".*Write \"communication_data_type\": \"fp32\"$"),
        ({**OURS, "max_grad_norm": 1.0}, ".*Write \"gradient_clipping\": \"auto\"$"),
        ({**OURS, "zero_stage": 2}, ".*Write \"zero_optimization\": {\"stage\": 2}$"),
        (config(allgather_size=5), ".*Write \"allgather_bucket_size\": 500000000$"),
        (config(gather_fp16_weights_on_model_save=True), ".*Write \"stage3_gather_16bit_weights_on_model_save\": true$"),
        ({**OURS, "elasticity": {}}, "'elasticity': .*Remove it.$"),
    ],
)  # fmt: skip
def test_keys_of_older_files_are_refused_with_the_line_to_write(file, message):
    (problem,) = said(file, "error")
    assert re.match(f"the DeepSpeed configuration: old key {message}", problem), problem


def test_older_keys_that_still_mean_the_same_pass():
    file = {**config(cpu_offload=None, allgather_bucket_size=5e8), "zero_allow_untested_optimizer": True}
    file["fp16"] = {"enabled": "auto", "auto_cast": False, "initial_scale_power": 16, "hysteresis": 2}
    assert said(file, "error") == said(file, "warning") == []


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (config(reduce_bucket_size="big"), 'zero_optimization.reduce_bucket_size is "big": .*valid integer.* Correct it or remove it'),
        (config(reduce_bucket_size=-5), "zero_optimization.reduce_bucket_size is -5: Input should be greater than 0"),
        (config(overlap_comm="later"), 'zero_optimization.overlap_comm is "later": .*valid boolean.* Correct it or remove it'),
        (config(offload_param={"device": "gpu"}), 'zero_optimization.offload_param.device is "gpu": .*\'cpu\' or \'nvme\''),
        ({**OURS, "fp16": {"loss_scale": "dynamic"}}, 'fp16.loss_scale is "dynamic": fp16.loss_scale must be a number'),
    ],
)  # fmt: skip
def test_a_value_of_another_type_is_refused(file, message):
    (problem,) = said(file, "error")
    assert re.match(f"the DeepSpeed configuration: {message}", problem), problem


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{\n  "zero_optimization": {"stage": 2,}\n}',
            r", line 2, column \d+: this is not JSON \(.*\)\. Correct that line",
        ),
        ("[1]", r": it is \[1\]: DeepSpeed expects an object there\."),
        ('{"bf16": {}, "bf16": {}}', r": 'bf16' stands twice in one object: only the last one would count\."),
        ('{"zero_optimization": {"stage": "3"}}', r': zero_optimization.stage is "3": .* Write "stage": 3$'),
        ('{"zero_optimization": {"stage": true}}', r": zero_optimization.stage is true: .*"),
        ('{"zero_optimization": {"stage": 4}}', r": zero_optimization.stage is 4: .* Write \"stage\": 2$"),
        ('{"data_types": "fp32"}', r': data_types is "fp32": DeepSpeed expects an object there\.'),
        ('{"zero_optimization": false}', r": zero_optimization is false: DeepSpeed expects an object there\."),
        ('{"zero_optimization": 2}', r": zero_optimization is 2: DeepSpeed expects an object there\."),
        ('{"zero_optimization": {"offload_param": "cpu"}}', r': zero_optimization.offload_param is "cpu": .*'),
    ],
)
def test_a_file_that_cannot_be_read_is_one_error(tmp_path, text, message):
    file = tmp_path / "ds.json"
    file.write_text(text)
    (problem,) = said(str(file), "error")
    assert re.match(re.escape(str(file)) + message, problem), problem


def test_a_missing_file_is_one_error():
    (problem,) = said("nowhere.json", "error")
    assert (
        problem
        == "--deepspeed nowhere.json: there is no such file. Give the path of a DeepSpeed file, such as ds_config.json."
    )


@pytest.mark.parametrize(
    ("file", "severity", "message"),
    [
        ({**OURS, "zero_optimisation": {}}, "warning", 'unknown key \'zero_optimisation\': DeepSpeed ignores it. Did you mean "zero_optimization"?'),
        (config(offload_optimiser={"device": "cpu"}), "error", "unknown key 'zero_optimization.offload_optimiser': DeepSpeed refuses it. Did you mean \"offload_optimizer\"?"),
        (config(offload_param={"devise": "cpu"}), "error", "unknown key 'zero_optimization.offload_param.devise': DeepSpeed refuses it. Did you mean \"device\"?"),
        ({**OURS, "bf16": {"enabled": True}, "fp16": {"enabled": True}}, "error", "'fp16.enabled' is True, but --fp16 False: they contradict each other"),
        ({**OURS, "data_types": {}}, "warning", "the gradients of a step's micro-batches are summed in 16 bits"),
        ({**OURS, "bf16": {"enabled": False}}, "error", "'bf16.enabled' is False, but --bf16 True: they contradict each other"),
        ({**OURS, "gradient_accumulation_steps": 4}, "error", "'gradient_accumulation_steps' is 4, but --gradient_accumulation_steps 1"),
        ({**OURS, "optimizer": {"type": "AdamW", "params": {"lr": 3e-5}}}, "error", "'optimizer.params.lr' is 3e-05, but --learning_rate 5e-05"),
        ({**OURS, "optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}, "warning", "the optimizer block (AdamW) overrides --optim adamw_torch"),
        ({key: value for key, value in OURS.items() if key != "gradient_clipping"}, "warning", "--max_grad_norm 1.0 has no effect"),
        ({key: value for key, value in OURS.items() if key != "gradient_accumulation_steps"}, "error", "'gradient_accumulation_steps' is missing"),
        (config(stage=3, stage3_gather_16bit_weights_on_model_save=False), "error", "no usable model would be saved"),
        (config(stage=3, stage3_gather_16bit_weights_on_model_save=None), "error", "no usable model would be saved"),
        (config(stage=0), "warning", "every GPU holds everything"),
    ],
)  # fmt: skip
def test_what_the_file_would_do(file, severity, message):
    assert any(message in problem for problem in said(file, severity)), deepspeed_file.lint(file, flags())
    assert not any(message in problem for problem in said(OURS, severity))


def test_sums_in_16_bits_are_warned_of_in_both_types_and_in_no_other():
    file = {**OURS, "data_types": {}, "bf16": {"enabled": "auto"}, "fp16": {"enabled": "auto"}}

    def warned(*flags: str) -> bool:
        return any("summed in 16 bits" in line for line in said(file, "warning", "--bf16", "False", *flags))

    assert (warned("--fp16", "True"), warned("--bf16", "True"), warned()) == (True, True, False)


def test_numbers_that_agree_with_the_flags_pass():
    file = {**OURS, "gradient_accumulation_steps": 4, "train_micro_batch_size_per_gpu": 8, "train_batch_size": 32}
    assert said(file, "error", "--gradient_accumulation_steps", "4") == []


def test_offloading_needs_a_compiler_and_an_optimizer_that_can_be_offloaded(monkeypatch):
    (problem,) = said(OURS, "error", "--optim", "adamw_bnb_8bit")
    assert "offload_optimizer with --optim adamw_bnb_8bit" in problem
    assert said(config(offload_optimizer=None), "error", "--optim", "adamw_bnb_8bit") == []
    assert said({**OURS, "zero_force_ds_cpu_optimizer": False}, "error", "--optim", "adamw_bnb_8bit") == []

    monkeypatch.setattr(deepspeed_file.shutil, "which", lambda name: None)
    (problem,) = said(OURS, "error")
    assert "needs a C++ compiler (c++) and ninja: not found on this machine" in problem
    assert said(config(offload_optimizer=None), "error") == []


def keys_asked_for() -> set[str]:
    """The top-level keys that DeepSpeed looks for while it reads a file."""
    from deepspeed.runtime.config import DeepSpeedConfig

    asked: set[str] = set()

    class Asked(dict):
        def get(self, key, *default):
            asked.add(key)
            return super().get(key, *default)

        def __contains__(self, key):
            asked.add(key)
            return super().__contains__(key)

        def keys(self):
            return self

    DeepSpeedConfig(Asked(train_batch_size=1, zero_optimization={"stage": 2}))
    return asked


def test_the_list_of_keys_is_deepspeeds():
    import deepspeed

    package = Path(deepspeed.__file__).parent
    folders = ("runtime", "monitor", "utils", "comm", "profiling", "autotuning", "compile", "datastates")
    sources = [source for folder in folders for source in (package / folder).rglob("*.py")]
    text = "\n".join(source.read_text(encoding="utf-8") for source in sources)
    written = {
        key for key in deepspeed_file.TOP_LEVEL_KEYS if re.search(rf"""["']{key}["']|^    {key}: """, text, re.M)
    }
    assert [key for key in deepspeed_file.TOP_LEVEL_KEYS if key not in written] == []
    assert not re.search(r"""["']gradient_cliping["']""", text)
    asked = keys_asked_for()
    assert {"bf16", "timers", "optimizer"} <= asked
    assert asked <= {*deepspeed_file.TOP_LEVEL_KEYS, *deepspeed_file.OLD_KEYS, "scheduler"}
    removed = re.findall(r"""^    "(\w+)":$""", (package / "runtime" / "config.py").read_text(), re.M)
    assert "nebula" in removed and {key for key in removed if "mics" not in key and "zeropp" not in key} <= set(
        deepspeed_file.OLD_KEYS
    )


def test_a_lock_that_a_killed_build_left_is_refused(tmp_path):
    """DeepSpeed would wait for it without a word, in this run and in all later ones."""
    left = tmp_path / "extensions" / "cpu_adam" / "lock"
    left.parent.mkdir(parents=True)
    baton = FileBaton(str(left))
    assert baton.try_acquire()  # a build that runs
    assert list(deepspeed_file._left_locks()) == []
    os.close(baton.fd)  # it was killed
    (problem,) = deepspeed_file._left_locks()
    assert str(problem) == (
        f"{left}: left by a process that was killed while it compiled cpu_adam for DeepSpeed: this run would wait for it for ever. "
        "Remove that file. If another machine that shares the folder compiles there now, wait for it."
    )

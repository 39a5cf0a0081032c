"""The DeepSpeed linter: what it finds, what it lets pass, and that its list of keys is DeepSpeed's."""

import json
import re
from pathlib import Path

import pytest

from sft.flags import parser
from sft.plan import deepspeed_file

pytest.importorskip("deepspeed")
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
    file.write_text(json.dumps({**OURS, "scheduler": {"type": "WarmupLR"}, "train_batch_size": 7}))
    problems = deepspeed_file.check_deepspeed(flags("--deepspeed", str(file)))
    assert problems == [
        f"{file}: 'train_batch_size' is 7, but 1 ranks x 8 per device x 1 accumulation = 8: they contradict each other. "
        'Write "train_batch_size": "auto" and the flag decides'
    ]
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith(
        f"warning: {file}: the scheduler block (WarmupLR) overrides --lr_scheduler_type linear"
    )
    assert printed[1].startswith("note: ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{\n  "zero_optimization": {"stage": 2,}\n}',
            r", line 2, column \d+: this is not JSON \(.*\)\. Mend that line",
        ),
        ("[1]", r": it holds a list, not an object\."),
        ('{"bf16": {}, "bf16": {}}', r": 'bf16' stands twice in one object: only the last one would count\."),
        ('{"zero_optimization": {"stage": "3"}}', r': zero_optimization.stage is "3": .* Write "stage": 3$'),
        ('{"zero_optimization": {"stage": true}}', r": zero_optimization.stage is true: .*"),
        ('{"zero_optimization": {"stage": 4}}', r": zero_optimization.stage is 4: .* Write \"stage\": 2$"),
        (
            '{"zero_optimization": {"reduce_bucket_size": "big"}}',
            r': zero_optimization.reduce_bucket_size is "big": .*"auto"$',
        ),
        ('{"data_types": "fp32"}', r': data_types is "fp32": DeepSpeed expects an object there\.'),
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
        ({**OURS, "bf16": {"enabled": True}, "fp16": {"enabled": True}}, "error", "bf16 and fp16 are both enabled"),
        ({**OURS, "data_types": {}}, "warning", "the gradients of a step's micro-batches are summed in 16 bits"),
        ({**OURS, "bf16": {"enabled": False}}, "error", "'enabled' is false, but --bf16 true: they contradict each other"),
        ({**OURS, "gradient_accumulation_steps": 4}, "error", "'gradient_accumulation_steps' is 4, but --gradient_accumulation_steps 1"),
        ({**OURS, "optimizer": {"type": "AdamW", "params": {"lr": 3e-5}}}, "error", "'lr' is 3e-05, but --learning_rate 5e-05"),
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


def test_numbers_that_agree_with_the_flags_pass():
    file = {**OURS, "gradient_accumulation_steps": 4, "train_micro_batch_size_per_gpu": 8, "train_batch_size": 32}
    assert said(file, "error", "--gradient_accumulation_steps", "4") == []


def test_offloading_needs_a_compiler_and_an_optimizer_that_can_be_offloaded(monkeypatch):
    (problem,) = said(OURS, "error", "--optim", "adamw_bnb_8bit")
    assert "offload_optimizer with --optim adamw_bnb_8bit" in problem
    assert said(config(offload_optimizer=None), "error", "--optim", "adamw_bnb_8bit") == []

    monkeypatch.setattr(deepspeed_file.shutil, "which", lambda name: None)
    (problem,) = said(OURS, "error")
    assert "needs a C++ compiler (c++) and ninja: not found on this machine" in problem
    assert said(config(offload_optimizer=None), "error") == []


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

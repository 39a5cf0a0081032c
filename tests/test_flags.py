"""Contradictions, unknown flags and launchers' flags, all at once; each flag once."""

import json
import re

import pytest
from scripts import ROOT

from sft import VERSION, flags, flags_2023
from sft.flags import parse
from sft.flags_2023 import translate
from sft.job import UserError

REQUIRED = ["--model_name_or_path", "m", "--data_path", "d.csv", "--output_dir", "o"]


def problems_of(*flags: str, checks=()) -> list[str]:
    with pytest.raises(UserError) as raised:
        parse([*REQUIRED, *flags], checks)
    return raised.value.problems


def test_a_flag_that_is_given_twice_is_told():
    words = "--seed 1 --save_steps 3 --evaluation_strategy no --seed=2 --eval_strategy epoch --save_steps 3".split()
    _, notices, problems = translate(words)
    assert problems == [] and notices[1:] == [
        "--seed is given 2 times: the last one counts, `--seed 2`",
        "--eval_strategy is given 2 times: the last one counts, `--eval_strategy epoch`",
    ]


def test_json_on_the_command_line_may_be_long():
    config = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"] * 300}
    sharded = config | {"state_dict_type": "SHARDED_STATE_DICT"}
    seen = (lambda flags: [str(flags.fsdp_config == sharded)],)
    assert problems_of("--fsdp", "true", "--fsdp_config", json.dumps(config), checks=seen) == ["True"]
    argv, _, problems = translate(["--fsdp", "full_shard", "--fsdp_config", json.dumps(config)])
    assert problems == [] and json.loads(argv[-1])["transformer_layer_cls_to_wrap"] == ["LlamaDecoderLayer"] * 300


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("none.json", "No such file or directory. Give a JSON file, or the JSON itself in quotes."),
        ("{", "not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))."),
    ],
)
def test_a_config_that_cannot_be_read_is_one_sentence(given, said):
    assert problems_of("--fsdp", "true", "--fsdp_config", given) == [f"--fsdp_config {given}: {said}"]
    assert translate(["--fsdp", "full_shard", "--fsdp_config", given])[2] == [f"--fsdp_config {given}: {said}"]


def test_flags_that_are_auto_or_a_value():
    def parsed(*words: str) -> tuple:
        seen = []
        problems_of(*words, checks=(lambda f: seen.append((f.tokens_per_micro_batch, f.compile_layers)) or ["stop"],))
        return seen[0]

    assert parsed() == parsed("--tokens_per_micro_batch", "auto", "--compile_layers", "auto") == (None, None)
    assert parsed("--tokens_per_micro_batch", "2048", "--compile_layers", "False") == (2048, False)
    for words in (("--tokens_per_micro_batch", "0"), ("--tokens_per_micro_batch", "many")):
        assert f"{words[1]!r} is neither auto nor a number of tokens" in problems_of(*words)[0]
    assert "'fast' is neither auto nor True or False" in problems_of("--compile_layers", "fast")[0]
    assert problems_of("--packing", "ja")[0] == "--packing ja: give True or False. `--help` lists every flag."


def test_auto_is_recorded_as_the_user_wrote_it(tmp_path):
    args = flags.TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert (args.tokens_per_micro_batch, args.to_dict()["tokens_per_micro_batch"]) == (None, "auto")
    args = flags.TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, tokens_per_micro_batch=9, compile_layers=True
    )
    assert (args.to_dict()["tokens_per_micro_batch"], args.to_dict()["compile_layers"]) == (9, True)


@pytest.mark.parametrize("typed", flags_2023.TYPED)
def test_what_people_type_is_known(typed):
    meant = flags_2023.TYPED[typed]
    assert f"--{meant}" in flags.parser()._option_string_actions
    assert f"--{typed}" not in flags.parser()._option_string_actions
    assert problems_of(f"--{typed}", "1") == [f"unknown flag --{typed}. Did you mean --{meant}?"]


def test_a_launchers_flag_belongs_before_the_script():
    assert problems_of("--nproc-per-node=4") == [
        "--nproc_per_node is the launcher's flag. Write it before the script: torchrun --nproc_per_node … llama_training.py …"
    ]


def test_unknown_flags_are_all_named_with_the_nearest_known_one():
    assert problems_of("--sorce", "prompt", "--num_train", "3", "--zzzzqqq", "1") == [
        "unknown flag --sorce. Did you mean --source?",
        "unknown flag --num_train. Did you mean --num_train_epochs?",
        "unknown flag --zzzzqqq. `--help` lists every flag.",
    ]


def test_the_beginning_of_a_flag_is_known():
    assert problems_of("--tokens", "5") == ["unknown flag --tokens. Did you mean --tokens_per_micro_batch?"]


def test_contradictions_and_checks_are_raised_together():
    found = problems_of(
        "--bf16", "True", "--fp16", "True", "--save_safetensors", "False", "--warmup_ratio", "3", "--save_dtype", "int8",
        checks=(lambda flags: [f"{flags.data_path[0]}: no such file."],),
    )  # fmt: skip
    assert [problem.split(" ")[0] for problem in found] == [
        "`--save_safetensors", "`--warmup_ratio", "--bf16", "--save_dtype", "d.csv:",
    ]  # fmt: skip


def test_offloaded_gradients_are_summed_by_gloo(monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    backend = (lambda flags: [str(flags.ddp_backend)],)
    assert problems_of("--fsdp", "full_shard offload", checks=backend) == ["cuda:nccl,cpu:gloo"]
    assert problems_of("--fsdp", "full_shard offload", "--ddp_backend", "gloo", checks=backend) == ["gloo"]
    assert problems_of("--fsdp", "full_shard", checks=backend) == ["None"]


def test_recomputation_asked_for_twice_is_refused():
    fsdp = ["--fsdp", "full_shard", "--fsdp_config", '{"activation_checkpointing": true}']
    assert problems_of(*fsdp, "--gradient_checkpointing", "True") == [
        '--gradient_checkpointing True and "activation_checkpointing" in --fsdp_config both recompute. Choose one.'
    ]


def test_fsdp_with_deepspeed_is_refused(monkeypatch):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert problems_of("--deepspeed", "x.json", "--fsdp", "full_shard") == [
        "--fsdp and --deepspeed both shard the model. Choose one."
    ]


def test_a_script_reads_its_own_command_line(monkeypatch):
    monkeypatch.setattr("sys.argv", ["llama_training.py", *REQUIRED, "--use_cpu", "True", "--packing", "True"])
    assert parse()[2].packing_asked
    assert not parse([*REQUIRED, "--use_cpu", "True"])[2].packing_asked
    assert parse([*REQUIRED, "--use_cpu", "True", "--packing=True"])[2].packing_asked


def test_what_is_missing_is_named():
    with pytest.raises(UserError) as raised:
        parse([])
    assert [problem.split()[0] for problem in raised.value.problems] == [
        "--model_name_or_path", "--data_path", "--output_dir",
    ]  # fmt: skip


def test_the_trainers_own_refusals_are_user_errors():
    assert "logging_steps" in problems_of("--logging_steps", "0")[0]
    assert "invalid choice" in problems_of("--lr_scheduler_type", "cosin")[0]


def test_every_flag_of_ours_has_help_and_stands_in_the_table():
    table = flags.flags_table()
    for name in ("model_name_or_path", "prompt_template", "packing", "save_dtype", "overwrite_output_dir"):
        assert f"| `--{name}` |" in table
    assert "--learning_rate" not in table


def test_the_version_is_one(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(["--version"])
    assert stop.value.code == 0
    assert re.fullmatch(r"\S+ (\d+\.\d+\.\d+) \(commit (\w{12}|not a git checkout)\)\n", capsys.readouterr().out)
    assert f'\nversion = "{VERSION}"\n' in (ROOT / "pyproject.toml").read_text()
    assert re.search(rf"^## {re.escape(VERSION)}\b", (ROOT / "CHANGELOG.md").read_text(), re.M)


def test_help_begins_with_this_projects_own_flags():
    printed = flags.parser().format_help()
    places = [printed.index(f"\n{heading}:") for heading in ("options", "model", "data")]
    places += [
        printed.index("\ntraining: this project's own"),
        printed.index("--model_max_length "),
        printed.index("--max_steps "),
    ]
    assert places == sorted(places)
    assert len(printed.partition("\n\n")[0].splitlines()) <= 2  # of the usage

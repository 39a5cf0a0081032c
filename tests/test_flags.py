"""The commands of 2023, word for word; contradictions and unknown flags, all at once."""

import json
import re
import shlex

import pytest
from scripts import ROOT

from sft import VERSION, flags, flags_2023
from sft.flags import parse
from sft.flags_2023 import translate
from sft.job import UserError

LLAMA_2023 = r"""
    --model_name_or_path openlm-research/open_llama_7b --data_path ./open_instruct_v1.2.csv --source prompt
    --target response --bf16 True --output_dir ./open_llama_7b_open_instruct --num_train_epochs 3
    --per_device_train_batch_size 2 --per_device_eval_batch_size 2 --model_max_length 1024
    --gradient_accumulation_steps 8 --evaluation_strategy "no" --save_strategy "steps" --save_steps 2000
    --save_total_limit 1 --learning_rate 2e-5 --weight_decay 0. --warmup_ratio 0.05 --lr_scheduler_type "cosine"
    --logging_steps 1 --fsdp "full_shard auto_wrap" --fsdp_transformer_layer_cls_to_wrap 'LlamaDecoderLayer'
"""
REQUIRED = ["--model_name_or_path", "m", "--data_path", "d.csv", "--output_dir", "o"]


def problems_of(*flags: str, checks=()) -> list[str]:
    with pytest.raises(UserError) as raised:
        parse([*REQUIRED, *flags], checks)
    return raised.value.problems


def test_the_original_command_is_translated_line_by_line():
    argv, notices, problems = translate(shlex.split(LLAMA_2023))
    assert problems == []
    config = '{"version": 2, "cpu_ram_efficient_loading": true, '
    config += '"reshard_after_forward": true, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}'
    assert notices == [
        "`--evaluation_strategy no` is now `--eval_strategy no`",
        "`--warmup_ratio 0.05` is now `--warmup_steps 0.05`",
        '`--fsdp "full_shard auto_wrap" --fsdp_transformer_layer_cls_to_wrap LlamaDecoderLayer` is now '
        f"`--fsdp true --fsdp_config '{config}'`",
    ]
    assert argv[-4:] == ["--fsdp", "true", "--fsdp_config", config]


def test_the_original_command_parses(capsys):
    model_args, data_args, training_args = parse(shlex.split(LLAMA_2023))
    assert model_args.model_name_or_path == "openlm-research/open_llama_7b"
    assert (data_args.source, data_args.target) == ("prompt", "response")
    assert training_args.warmup_steps == 0.05
    assert training_args.eval_strategy == "no"
    assert training_args.model_max_length == 1024
    assert training_args.gradient_accumulation_steps == 8
    assert capsys.readouterr().out.count("is now") == 3


def test_fsdp_settings_reach_the_trainer_where_there_is_a_gpu():
    argv, _, _ = translate(["--fsdp", "full_shard auto_wrap offload", "--fsdp_transformer_later_cls_to_wrap", "Block"])
    parsed, _ = flags.parser().parse_known_args(argv)
    assert parsed.fsdp == "true"
    assert json.loads(parsed.fsdp_config) == {
        "version": 2,
        "cpu_ram_efficient_loading": True,
        "reshard_after_forward": True,
        "cpu_offload": True,
        "transformer_layer_cls_to_wrap": ["Block"],
    }


def test_weights_stay_gathered_where_gradients_alone_are_sharded():
    argv, _, _ = translate(["--fsdp", "shard_grad_op auto_wrap"])
    assert json.loads(argv[-1]) == {"version": 2, "cpu_ram_efficient_loading": True, "reshard_after_forward": False}


def test_of_two_configs_the_last_counts_and_beats_the_old_words():
    first, last = '{"reshard_after_forward": true, "version": 1}', '{"cpu_ram_efficient_loading": false}'
    argv, _, _ = translate(["--fsdp_config", first, "--fsdp", "shard_grad_op", "--fsdp_config", last])
    assert argv[:-1] == ["--fsdp", "true", "--fsdp_config"]
    assert json.loads(argv[-1]) == {"version": 2, "cpu_ram_efficient_loading": False, "reshard_after_forward": False}


def test_the_trainer_accepts_the_translated_fsdp_flags(monkeypatch):
    # on a CPU they are dropped before the Trainer sees them; here they are not
    monkeypatch.setattr(flags, "_drop_fsdp_where_nothing_is_sharded", lambda flags: [])
    words = ["--fsdp", "full_shard auto_wrap", "--fsdp_transformer_layer_cls_to_wrap", "LlamaDecoderLayer"]
    args = parse([*REQUIRED, "--use_cpu", "True", *words])[2]
    assert args.fsdp is True
    assert args.fsdp_plugin_args["fsdp_version"] == 2
    assert args.fsdp_plugin_args["reshard_after_forward"] is True
    assert args.fsdp_plugin_args["cpu_ram_efficient_loading"] is True
    assert args.fsdp_plugin_args["transformer_cls_names_to_wrap"] == "LlamaDecoderLayer"


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("--evaluation_strategy=steps", "--eval_strategy steps"),
        ("--num_training_epochs 3", "--num_train_epochs 3"),
        ("--no_cuda True", "--use_cpu True"),
        ("--group_by_length True", "--train_sampling_strategy group_by_length"),
        ("--save_safetensors True", ""),
        ("--include_tokens_per_second True", ""),
    ],
)
def test_other_names_of_2023(old, new):
    argv, notices, problems = translate(old.split())
    assert (argv, problems) == (new.split(), [])
    assert len(notices) == 1


def test_a_value_is_not_taken_for_a_flag_and_bare_flags_stay_bare():
    flags = ["--learning_rate", "-1e-5", "--bf16", "--data_path", "a b.csv"]
    assert translate(flags) == (flags, [], [])


def test_a_token_is_not_printed():
    argv, notices, _ = translate(["--push_to_hub_token", "hf_secret"])
    assert (argv, notices) == (["--hub_token", "hf_secret"], ["`--push_to_hub_token ***` is now `--hub_token ***`"])


def test_warmup_steps_win_over_a_ratio_as_they_did():
    both = ["--warmup_steps", "100", "--warmup_ratio", "0.1"]
    notice = "`--warmup_ratio 0.1` is ignored: --warmup_steps 100 wins, as it did in transformers 4"
    for argv in (both, [*both[2:], *both[:2]]):
        assert translate(argv) == (both[:2], [notice], [])
    argv, _, _ = translate(["--warmup_steps", "0", "--warmup_ratio", "0.1"])
    assert argv == ["--warmup_steps", "0", "--warmup_steps", "0.1"]  # the last one counts


@pytest.mark.parametrize(("ratio", "fine"), [("0", True), ("0.99", True), ("1", False), ("-0.1", False), ("5%", False)])
def test_a_ratio_lies_below_1(ratio, fine):
    assert (translate(["--warmup_ratio", ratio])[2] == []) is fine


def test_json_on_the_command_line_may_be_long():
    config = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"] * 300}
    seen = (lambda flags: [str(flags.fsdp_config == config)],)
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


def test_contradictions_and_checks_are_raised_together():
    found = problems_of(
        "--bf16", "True", "--fp16", "True", "--save_safetensors", "False", "--warmup_ratio", "3", "--save_dtype", "int8",
        checks=(lambda flags: [f"{flags.data_path}: no such file."],),
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

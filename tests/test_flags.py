"""The commands of 2023, word for word; contradictions and unknown flags, all at once."""

import json
import shlex

import pytest

from sft import flags
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

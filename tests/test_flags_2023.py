"""The commands of 2023, word for word, and what becomes of each."""

import json
import shlex

import pytest

from sft import flags
from sft.flags import parse
from sft.flags_2023 import translate

LLAMA_2023 = r"""
    --model_name_or_path openlm-research/open_llama_7b --data_path ./open_instruct_v1.2.csv --source prompt
    --target response --bf16 True --output_dir ./open_llama_7b_open_instruct --num_train_epochs 3
    --per_device_train_batch_size 2 --per_device_eval_batch_size 2 --model_max_length 1024
    --gradient_accumulation_steps 8 --evaluation_strategy "no" --save_strategy "steps" --save_steps 2000
    --save_total_limit 1 --learning_rate 2e-5 --weight_decay 0. --warmup_ratio 0.05 --lr_scheduler_type "cosine"
    --logging_steps 1 --fsdp "full_shard auto_wrap" --fsdp_transformer_layer_cls_to_wrap 'LlamaDecoderLayer'
"""


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
    monkeypatch.setattr(flags, "drop_fsdp_where_nothing_is_sharded", lambda flags: [])
    words = ["--fsdp", "full_shard auto_wrap", "--fsdp_transformer_layer_cls_to_wrap", "LlamaDecoderLayer"]
    required = ["--model_name_or_path", "m", "--data_path", "d.csv", "--output_dir", "o"]
    args = parse([*required, "--use_cpu", "True", *words])[2]
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

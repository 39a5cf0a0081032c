"""Each of the Trainer's own arguments is honoured, translated or refused, and a value that cannot work is one sentence."""

import argparse
import contextlib
import os
import re

import huggingface_hub
import pytest
import transformers
from transformers.training_args import OptimizerNames

from sft import flags, trainer_flags
from sft.flags import parse
from sft.job import UserError
from sft.plan.deepspeed_file import check_deepspeed
from sft.report.progress import tracker_problems
from sft.run.evaluation import evaluation_problems, without_training
from sft.trainer_flags import FIELDS, HONOURED, RANGES, REFUSED, TRANSLATED, UNDER_PACKING

REQUIRED = ["--model_name_or_path", "m", "--data_path", "d.csv", "--output_dir", "o", "--use_cpu", "True"]
NEWER = {"activation_checkpointing", "activation_checkpointing_kwargs"}  # unknown to transformers 5.17


def problems_of(words: str, *more: str) -> list[str]:
    """What is wrong with flags on a CPU, besides a model and data that are not there."""
    seen: list[str] = []

    def stop(flags) -> list[str]:
        return [*without_training(flags), "stop here"]

    with pytest.raises(UserError) as raised:
        parse([*REQUIRED, *words.split(), *more], (stop,))
    seen += raised.value.problems
    return [problem for problem in seen if problem != "stop here"]


def test_every_argument_of_the_trainer_stands_in_one_table():
    tables = [HONOURED, list(TRANSLATED), list(REFUSED), list(UNDER_PACKING)]
    names = [name for table in tables for name in table]
    assert sorted(names) == sorted(set(names))
    assert set(FIELDS) - set(names) == set(), "new in transformers: say what becomes of it in sft/trainer_flags.py"
    assert set(names) - set(FIELDS) <= NEWER
    assert set(RANGES) <= {action.dest for action in flags.parser()._actions}


def another_value(name: str) -> str | None:
    """A value for a flag that is not its default; None where a command line has no form for it."""
    (action,) = [a for a in flags.parser()._actions if f"--{name}" in a.option_strings]
    default = trainer_flags.default(name)
    if name == "include_num_input_tokens_seen":
        return "all"
    if isinstance(default, bool):
        return str(not default)
    if isinstance(default, str):
        return "sequential" if name == "train_sampling_strategy" else "another"
    return None if action.type not in (int, float, str) else "0.5" if action.type is float else "3"


@pytest.mark.parametrize("name", [*REFUSED, *UNDER_PACKING])
def test_what_is_refused_says_what_to_do(name):
    value = another_value(name)
    if value is None:
        assert name == "parallelism_config"
        return
    (problem,) = problems_of(f"--{name} {value}")
    assert problem.startswith(f"--{name} ")
    assert re.search(r"Remove the flag|remove the flag|[Uu]se --|Add --packing False|python -m", problem)
    if name in UNDER_PACKING:
        assert problems_of(f"--{name} {value} --packing False") == []


def test_defaults_that_differ_from_the_trainers_are_told_truthfully():
    shown = {a.dest: a.default for a in flags.parser()._actions if not isinstance(a, argparse._StoreFalseAction)}
    for name, value in trainer_flags.OTHER_DEFAULTS.items():
        assert shown[name] == value != FIELDS[name].default
    assert problems_of("--prediction_loss_only True --remove_unused_columns False") == []


@pytest.mark.parametrize("name", RANGES)
def test_values_out_of_range_are_refused_on_both_sides(name):
    low, high = RANGES[name]
    (action,) = [a for a in flags.parser()._actions if f"--{name}" in a.option_strings]
    wrong = [f"{low - 1:.0f}"]
    if high < 1:
        wrong += ["1"]
    elif high < 1e10:
        wrong += [f"{high + 1:.0f}"]
    elif action.type is float:
        wrong += ["nan"]
    for value in wrong:
        found = problems_of(f"--{name}={value} --packing False")
        of_it = [problem for problem in found if re.match(rf"--{name} [-\dn]", problem)]
        assert ["it must be" in problem for problem in of_it] == [True], (value, found)  # one problem for one mistake
    assert any("invalid" in problem for problem in problems_of(f"--{name} many"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--max_steps 0", "--max_steps 0 trains nothing. Give a number of steps, or --num_train_epochs."),
        ("--num_train_epochs 0", "--num_train_epochs 0 trains nothing. Give more than 0."),
        ("--num_train_epochs -2", "--num_train_epochs -2.0: it must be at least 0."),
        ("--learning_rate -1e-5", "--learning_rate -1e-05: it must be at least 0."),
        ("--per_device_train_batch_size 0", "--per_device_train_batch_size 0: it must be at least 1."),
        ("--save_steps inf", "--save_steps inf: it must be at least 0 and at most 1000000000."),
        ("--seed -1", "--seed -1: it must be at least 0 and at most 4294967295."),
        ("--fp16 True", "--fp16 True: a CPU computes float32 then. Remove the flag, or use --bf16 True."),
        ("--optim_args betas", "--optim_args betas: write name=value, several with commas."),
        (
            "--torch_compile_mode fast",
            "--torch_compile_mode fast: choose one of default, reduce-overhead, max-autotune, max-autotune-no-cudagraphs.",
        ),
        (
            "--do_train False --do_eval True",
            "--do_train False evaluates a model without training it. Add --do_eval True and --eval_data_path FILE.",
        ),
        (
            "--do_train False --do_eval True --eval_split 0.1 --use_lora True",
            "--do_train False with --use_lora True: evaluate the merged model (python -m sft.merge_lora). Remove the flag.",
        ),
        (
            "--do_train False --do_eval True --eval_split 0.1 --resume_from_checkpoint True",
            "--do_train False with --resume_from_checkpoint: name the checkpoint with --model_name_or_path.",
        ),
        ("--do_eval True", "--do_eval True: add --eval_strategy epoch (or steps), and rows to evaluate."),
        ("--do_predict True", "--do_predict True: ask the tuned model with: python -m sft.generate."),
        ("--save_steps 0", "--save_steps 0 saves nothing. Use --save_strategy no."),
        ("--metric_for_best_model bleu", "--metric_for_best_model bleu: evaluations give loss and perplexity."),
        (
            "--metric_for_best_model eval_perplexity --greater_is_better True",
            "--greater_is_better True: the lower perplexity is the better one. Remove the flag.",
        ),
        (
            "--load_best_model_at_end True --greater_is_better True",
            "--greater_is_better True: the lower loss is the better one. Remove the flag.",
        ),
        (
            "--use_liger_kernel True",
            "--use_liger_kernel needs a GPU: its kernels are written in Triton. Remove the flag.",
        ),
        (
            '--accelerator_config {"split_batches":true}',
            "--accelerator_config: split_batches would change which rank has which rows. Remove the key.",
        ),
        (
            '--lr_scheduler_kwargs {"num_cycles":2}',
            "--lr_scheduler_kwargs: linear does not take 'num_cycles'. It takes none.",
        ),
        (
            '--lr_scheduler_type cosine_with_restarts --lr_scheduler_kwargs {"cycles":2}',
            "--lr_scheduler_kwargs: cosine_with_restarts does not take 'cycles'. It takes num_cycles.",
        ),
        (
            "--lr_scheduler_type cosine_with_min_lr",
            "--lr_scheduler_type cosine_with_min_lr with --lr_scheduler_kwargs {}: "
            "One of min_lr or min_lr_rate should be set through the `lr_scheduler_kwargs`.",
        ),
        (
            "--lr_scheduler_kwargs {cycles:2}",
            "--lr_scheduler_kwargs {cycles:2}: not JSON (Expecting property name enclosed in double quotes: line 1 column 2 (char 1)).",
        ),
        (
            '--lr_scheduler_type cosine_with_restarts --lr_scheduler_kwargs {"num_cycles":"a"}',
            "--lr_scheduler_type cosine_with_restarts with --lr_scheduler_kwargs {'num_cycles': 'a'}: could not convert string to float: 'a'.",
        ),
        ("--optim_args a=b=c", "--optim_args a=b=c: write name=value, several with commas."),
        (
            "--optim sgd --optim_args momentum=0.9,bogus=1",
            "--optim_args bogus=1 changes nothing: sgd does not read it, or that is its default.",
        ),
        (
            "--optim sgd --optim_args momentum=much",
            "--optim_args momentum=much: sgd cannot read it (could not convert string to float: 'much').",
        ),
        (
            "--optim_target_modules q_proj",
            "--optim_target_modules changes nothing: adamw_torch_fused has no layers of its own. Remove the flag.",
        ),
        (
            "--dataloader_persistent_workers True",
            "--dataloader_persistent_workers True needs workers: give --dataloader_num_workers too.",
        ),
        (
            '--gradient_checkpointing_kwargs {"use_reentrant":false}',
            "--gradient_checkpointing_kwargs changes nothing without --gradient_checkpointing True.",
        ),
        (
            '--liger_kernel_config {"rope":false}',
            "--liger_kernel_config changes nothing without --use_liger_kernel True.",
        ),
    ],
)
def test_each_mistake_is_one_sentence(words, said):
    assert problems_of(words) == [said]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--save_steps 10 --save_strategy epoch", ["--save_steps changes nothing: --save_strategy epoch decides"]),
        (
            "--save_steps 10 --save_total_limit 2 --save_strategy no",
            ["--save_steps changes nothing: --save_strategy no decides", "--save_total_limit changes nothing: --save_strategy no decides"],
        ),
        ("--eval_steps 10", ["--eval_steps changes nothing: --eval_strategy no decides"]),
        ("--logging_steps 10 --logging_strategy epoch", ["--logging_steps changes nothing: --logging_strategy epoch decides"]),
        ("--max_steps 5 --num_train_epochs 3", ["--num_train_epochs changes nothing: --max_steps 5 decides"]),
        ("--lr_scheduler_type constant --warmup_ratio 0.1", ["--warmup_steps changes nothing: --lr_scheduler_type constant has no warm-up"]),
        ("--optim sgd --adam_beta1 0.8", ["--adam_beta1 changes nothing: --optim sgd does not read it"]),
        ("--packing False --tokens_per_micro_batch 512", ["--tokens_per_micro_batch changes nothing: --packing False"]),
        ("--hub_model_id me/m --run_name a", ["--hub_model_id changes nothing: it needs --push_to_hub True", "--run_name changes nothing: it needs --report_to"]),
        ("--fsdp_config {}", ["--fsdp_config changes nothing: it needs --fsdp"]),
        ("--ddp_static_graph True", ["--ddp_static_graph changes nothing: this is not data-parallel training in several processes"]),
        ("--resume_with_changes True", ["--resume_with_changes changes nothing: it needs --resume_from_checkpoint"]),
        (
            "--overwrite_output_dir True --resume_from_checkpoint True",
            ["--overwrite_output_dir changes nothing: --resume_from_checkpoint continues the run there"],
        ),
        ("--train_on last", ["--train_on changes nothing: it needs --messages"]),
        ("--messages m --source s", ["--source changes nothing: --messages names the column"]),
        # what has an effect, and the flags of 2023 that have none
        ("--evaluation_strategy no --per_device_eval_batch_size 2 --save_strategy steps --save_steps 2000 --save_total_limit 1", []),
        ("--save_steps 10 --eval_strategy steps --eval_steps 3 --eval_delay 2 --adam_beta1 0.8 --warmup_steps 3", []),
        ("--fsdp full_shard --fsdp_config {} --overwrite_output_dir True --num_train_epochs 2 --max_steps -1", []),
    ],
)  # fmt: skip
def test_a_flag_that_another_one_makes_void_is_told(words, said, monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    _, notices = flags._read(flags.parser(), [*REQUIRED, *words.split()], ())
    assert [notice for notice in notices if "changes nothing" in notice] == said


def test_overwriting_a_finished_model_while_resuming_is_not_void(tmp_path):
    (tmp_path / "COMPLETE.json").touch()
    words = ["--output_dir", str(tmp_path), "--overwrite_output_dir", "True", "--resume_from_checkpoint", "True"]
    assert not any("changes nothing" in notice for notice in flags._read(flags.parser(), [*REQUIRED, *words], ())[1])


def of_other_kinds(name: str) -> list[str]:
    """Values for a flag: below and above what it can have, and of another kind."""
    (action,) = [a for a in flags.parser()._actions if f"--{name}" in a.option_strings]
    if action.type is int:
        return ["-1", "many", "1.5"]
    return ["-1", "nan", "many"] if action.type is float else ["no-such-value", "-1", "{"]


TEXTS = set("output_dir run_name project hub_token hub_model_id hub_revision resume_from_checkpoint local_rank".split())
TEXTS |= {"trackio_space_id", "trackio_bucket_id", "trackio_static_space_id", "optim_target_modules"}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(FIELDS.keys() - NEWER - TEXTS))
def test_a_value_of_another_kind_is_one_sentence(name):
    for value in of_other_kinds(name):
        if (name, value) == ("max_steps", "-1"):  # its default: --num_train_epochs decides
            continue
        with pytest.raises(UserError) as refused:
            parse([*REQUIRED, f"--{name}={value}"], (tracker_problems, evaluation_problems, check_deepspeed))
        assert "Traceback" not in str(refused.value)


def below_above_and_of_another_kind(name: str) -> list[str]:
    (action,) = [a for a in flags.parser()._actions if f"--{name}" in a.option_strings]
    if action.type is int:
        return ["-1", "0", "1", "2147483648", "many", "1.5", ""]
    if action.type is float:
        return ["-1", "0", "0.5", "1", "2", "1e30", "nan", "inf", "many"]
    return ["no-such-value", "-1", "{", "{}", "[]", "True", "False", "1e9", ""]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(FIELDS.keys() - NEWER - {"parallelism_config"}))
def test_every_value_is_taken_or_refused_in_a_sentence(name, monkeypatch):
    monkeypatch.setattr("sft.trainer_flags._hub", lambda flags: [])
    before = dict(os.environ)
    for value in below_above_and_of_another_kind(name):
        with contextlib.suppress(UserError):
            parse([*REQUIRED, f"--{name}={value}"], (tracker_problems, evaluation_problems, check_deepspeed))
        os.environ.clear()
        os.environ.update(before)  # the Trainer's arguments set variables


@pytest.mark.parametrize(
    ("words", "said", "takes"),
    [
        ('--accelerator_config {"foo":1}', "--accelerator_config: there is no foo. It takes ", "non_blocking"),
        (
            '--gradient_checkpointing True --gradient_checkpointing_kwargs {"foo":1}',
            "--gradient_checkpointing_kwargs: there is no foo. It takes ",
            "use_reentrant",
        ),
    ],
)
def test_a_key_that_nothing_reads_is_refused_with_those_that_are_read(words, said, takes):
    (problem,) = problems_of(words)
    assert problem.startswith(said) and takes in problem.removeprefix(said)


def test_values_that_work_are_left_alone():
    assert problems_of("--do_train True --do_eval True --eval_strategy epoch --disable_tqdm True --local_rank=0") == []
    assert problems_of("--num_train_epochs 0 --max_steps 3 --seed 4294967295 --adam_beta1 0.0") == []
    assert problems_of('--lr_scheduler_type cosine_with_restarts --lr_scheduler_kwargs {"num_cycles":2}') == []
    assert problems_of("--include_num_input_tokens_seen False") == []
    assert problems_of("--fp16 True --plan_only True --use_cpu False") == []
    assert problems_of("--optim sgd --optim_args momentum=0.9,nesterov=True --torch_compile_backend inductor") == []
    assert problems_of('--gradient_checkpointing True --gradient_checkpointing_kwargs {"use_reentrant":false}') == []
    assert problems_of("--save_strategy best --eval_strategy epoch") == []
    assert problems_of('--accelerator_config {"non_blocking":true}') == []


@pytest.mark.parametrize("name", [kind.value for kind in transformers.SchedulerType])
def test_every_scheduler_can_be_tried(name):
    found = problems_of(f"--lr_scheduler_type {name}")
    needs = name.endswith("min_lr") or name == "warmup_stable_decay"
    assert bool(found) == needs, found


def test_the_lower_perplexity_is_the_better_one():
    seen = []
    with pytest.raises(UserError):
        parse(
            ["--model_name_or_path", "m", "--data_path", "d", "--output_dir", "o", "--metric_for_best_model", "perplexity"],
            (lambda flags: seen.append(flags.greater_is_better) or ["stop"],),
        )  # fmt: skip
    assert seen == [False]


def test_an_optimizer_that_projects_layers_is_told_which(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    (problem,) = problems_of("--optim galore_adamw")
    assert problem.endswith("name the layers that it projects, such as --optim_target_modules all-linear.")
    assert problems_of("--optim galore_adamw --optim_target_modules all-linear --optim_args rank=64") == []


def test_an_optimizer_whose_package_is_missing_is_refused(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name != "torch" else object())
    needs = {
        name.value: trainer_flags._optimizer(argparse.Namespace(optim=name, optim_target_modules=None, optim_args=None))
        for name in OptimizerNames
    }
    assert needs["schedule_free_adamw"] == [
        "--optim schedule_free_adamw needs the package schedulefree. Run: pip install schedulefree"
    ]
    packages = {name: re.findall("install (.*)", found[0])[0] for name, found in needs.items() if found}
    assert packages["stable_adamw"] == "torch-optimi" and packages["galore_adamw_8bit"] == "galore-torch"
    assert packages["adamw_torch_8bit"] == "torchao" and packages["paged_adamw_8bit"] == "bitsandbytes"
    assert set(needs) - set(packages) == {
        "adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"
    }  # fmt: skip


def test_an_upload_needs_a_token_that_the_hub_knows(monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    (problem,) = problems_of("--push_to_hub True")
    assert problem.startswith("--push_to_hub needs a token. Run hf auth login, or set HF_TOKEN")

    def whoami(token):
        raise ConnectionError(f"no route to the hub with {token}\nand more")

    monkeypatch.setattr(huggingface_hub, "whoami", whoami)
    (problem,) = problems_of("--push_to_hub True --hub_token hf_secret")
    assert "(ConnectionError: no route to the hub with ***)" in problem and "hf_secret" not in problem
    monkeypatch.setenv("RANK", "1")  # rank 0 asks for all
    assert problems_of("--push_to_hub True --hub_token hf_secret") == []
    monkeypatch.delenv("RANK")
    monkeypatch.setattr(huggingface_hub, "whoami", lambda token: {"name": "me"})
    assert problems_of("--push_to_hub True --hub_token hf_secret") == []


def test_the_table_shows_defaults_and_what_becomes_of_each_flag():
    table = trainer_flags.trainer_table()
    assert "| `--learning_rate` | `5e-05` | honoured. |" in table
    assert "| `--prediction_loss_only` | `True` | refused: no logits are kept" in table
    assert "| `--neftune_noise_alpha` |  | honoured with --packing False; packed, refused: its noise" in table
    assert "| `--local_rank` | `-1` | translated: launchers give it" in table

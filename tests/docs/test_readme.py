"""README and docs/ against the code: commands parse, parts that come from the code are the code's, what is quoted is printed."""

import ast
import csv
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import make_tiny_llama
import pytest
import readme
import transformers
from scripts import ROOT
from torch.distributed.run import get_args_parser

import utils
from sft import flags, flags_2023, generate, job
from sft.data import template
from sft.data.llama_tokenizer import load_llama_tokenizer
from sft.flags import DataArguments, ModelArguments, TrainingArguments

PAGES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")))
}
README, ORIGINAL_PAGE, RESULTS = PAGES["README.md"], PAGES["docs/original.md"], PAGES["docs/results.md"]


def test_the_first_page_is_one():
    assert len(README.splitlines()) <= 240 and len(README.encode()) <= 18_000


def commands(text: str) -> list[str]:
    """Every command of the text's bash blocks, one line each."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, re.S | re.M)
    joined = "\n".join(blocks).replace("\\\n", " ")
    return [line.strip() for line in joined.splitlines() if line.strip() and not line.startswith("#")]


def check(command: str) -> None:
    """Parse a command as the program that it names does.

    Raises: AssertionError, UserError or SystemExit when the program would refuse it.
    """
    words = shlex.split(command, comments=True)
    program = words[0]
    if program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M)
        assert words[1] in targets, words[1]
    elif program == "torchrun":
        launcher = get_args_parser().parse_args(words[1:])
        check_script(launcher.training_script, launcher.training_script_args)
    elif program == "python" and words[1] == "-m":
        if words[2] == "sft.generate":
            generate.parse(words[3:])
        else:
            assert Path(ROOT, *words[2].split(".")).with_suffix(".py").is_file(), words[2]
            known = subprocess.run([sys.executable, *words[1:3], "--help"], cwd=ROOT, capture_output=True, text=True)
            assert all(word in known.stdout for word in words[3:] if word.startswith("-")), command
    elif program == "python":
        check_script(words[1], words[2:])
    elif program == "pip":
        assert all((ROOT / word).is_file() for word in words if word.endswith(".txt"))
    else:
        assert command in ("python3 -m venv .venv", "source .venv/bin/activate"), f"what is {command!r}?"


def check_script(script: str, words: list[str]) -> None:
    source = (ROOT / script).read_text(encoding="utf-8")
    if "--plan_only" in words:  # ends inside `parse`, before what the Trainer would check
        words = [*words, "--use_cpu", "True", "--data_path", "x.csv", "--output_dir", "x"]
    if script in ("llama_training.py", "xgen_training.py"):
        flags.parse(words)
    else:
        assert all(f'"{word}"' in source for word in words if word.startswith("-")), script


@pytest.mark.parametrize("command", dict.fromkeys(commands("\n".join(PAGES.values()))))
def test_every_command_is_understood(command, monkeypatch):
    monkeypatch.chdir(ROOT)
    if "--deepspeed" in command:
        pytest.importorskip("deepspeed")
    check(command)


@pytest.mark.parametrize("script", ["examples/demo.sh", "examples/slurm.sh"])
def test_every_torchrun_of_the_scripts_is_understood(script, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("SLURM_NNODES", "2")
    text = os.path.expandvars((ROOT / script).read_text().replace("\\\n", " "))
    found = [
        line.strip().removeprefix("srun ") for line in text.splitlines() if "torchrun " in line and "#" not in line
    ]
    assert len(found) == 1
    check(found[0])


@pytest.mark.parametrize(
    "command",
    [
        "torchrun --nproc_per_node=4 llama_training.py --model_name_or_path a --data_path b --output_dir c --epochs 3",
        "torchrun --nproc-per-nod=4 --nnode llama_training.py",
        "python -m sft.generate --model a --instructions hello",
        "python examples/make_tiny_llama.py --folder x",
        "make demon",
        "pip install -r requirement.txt",
        "bash anything.sh",
    ],
)
def test_a_wrong_command_would_be_noticed(command):
    with pytest.raises((AssertionError, job.UserError, SystemExit, FileNotFoundError)):
        check(command)


ORIGINAL = """{processes} {script}.py --model_name_or_path {model} --data_path ./open_instruct_v1.csv --source prompt
    --target response --bf16 True --output_dir {output} --num_train_epochs 3 --per_device_train_batch_size {batch}
    --per_device_eval_batch_size {batch} --model_max_length 1024 --gradient_accumulation_steps {accumulation}
    --evaluation_strategy no --save_strategy steps --save_steps 2000 --save_total_limit 1 --learning_rate {rate}
    --weight_decay 0. --warmup_ratio 0.05 --lr_scheduler_type cosine --logging_steps 1 --fsdp "full_shard auto_wrap"
    --fsdp_transformer_layer_cls_to_wrap LlamaDecoderLayer"""
LLAMA = {
    "processes": "torchrun --nproc_per_node=4",
    "script": "llama_training",
    "model": "openlm-research/open_llama_7b",
}
LLAMA |= {"output": "./open_llama_7b_open_instruct", "batch": 2, "accumulation": 8, "rate": "2e-5"}
XGEN = {"processes": "torchrun --nproc_per_node=3", "script": "xgen_training", "model": "Salesforce/xgen-7b-4k-base"}
XGEN |= {"output": "./xgen-7b-4k-open-instruct", "batch": 1, "accumulation": 32, "rate": "1e-5"}


def test_the_originals_commands_stand_there_word_for_word_with_what_they_become():
    def original_in(page: str) -> list[list[str]]:
        blocks = re.findall(r"<!-- original command -->\n(```bash\n.*?^```)", page, re.S | re.M)
        return [shlex.split(commands(block)[0]) for block in blocks]

    original = [shlex.split(ORIGINAL.format(**recipe)) for recipe in (LLAMA, XGEN)]
    assert original_in(ORIGINAL_PAGE) == original and original_in(README) == original[:1]
    for words in original:
        for notice in flags_2023.translate(words[3:])[1]:
            assert f"\n{notice}\n" in ORIGINAL_PAGE and f"\n{notice}\n" in README


def test_the_originals_parameters_are_all_understood(capsys):
    table = re.search(r"\| original \| today .*?\n\n", ORIGINAL_PAGE, re.S)[0]
    names = re.findall(r"^\| `(\w+)` \|", table, re.M)
    assert names[0] == "nproc_per_node" and len(names) == 23
    values = {
        "save_strategy": "steps",
        "evaluation_strategy": "no",
        "fsdp": "full_shard",
        "lr_scheduler_type": "cosine",
    }
    values |= {"warmup_ratio": "0.05", "bf16": "True"}
    misspelt = "fsdp_transformer_later_cls_to_wrap"
    flags.parse([word for name in (*names[1:], misspelt) for word in (f"--{name}", values.get(name, "1"))])
    printed = capsys.readouterr().out
    for old, new in re.findall(r"^\| `(\w+)` \| `(\w+)` \|", table, re.M):
        assert re.search(rf"`--{old} \S+` is now `--{new} ", printed), old


def test_the_map_is_the_codes():
    page = PAGES["docs/code.md"]
    assert readme.render(page) == page, "docs/code.md is behind the code: make readme"
    assert "sft/run/trainer.py  " in page
    behind = page.replace("sft/run/trainer.py  ", "sft/gone.py  ")
    assert readme.render(behind) == page


def test_the_page_of_flags_is_the_codes():
    page, made = (ROOT / "docs" / "flags.md").read_text(encoding="utf-8"), readme.flags_page()
    version = re.search(r"\(transformers ([\d.]+)\)", page)[1]
    if transformers.__version__.startswith(f"{version}."):
        assert page == made, "docs/flags.md is behind the code: make readme"
    assert page.split("## Of the Trainer")[0] == made.split("## Of the Trainer")[0]
    fields = re.findall(r"^\| `--", page.split("## Of the Trainer")[1], re.M)
    assert f"the Trainer's own {len(fields)} arguments" in README


def test_the_map_names_every_file():
    described = readme.code_map()
    names = [line.split("  ")[0] for line in described.splitlines()]
    assert all((ROOT / name).exists() for name in names)
    assert all(line.split("  ", 1)[1].strip() for line in described.splitlines()), "a file without a docstring"
    tracked = {
        path.relative_to(ROOT) for folder in ("", "sft", "examples") for path in ROOT.joinpath(folder).glob("*.*")
    }
    linked = re.findall(r"\]\(([\w./-]+)\)", README)
    for path in tracked:
        if path.name.startswith((".", "__")) or path.name == "README.md":
            continue
        assert str(path) in names or str(path) in linked, f"the map lacks {path}"


def test_help_shows_every_flag_of_the_table():
    printed = " ".join(flags.parser().format_help().split())
    rows = re.findall(r"^\| `(--\w+)` \| [^|]*\| (.*) \|$", flags.flags_table(), re.M)
    assert len(rows) > 30
    for flag, text in rows:
        assert flag in printed
        assert " ".join(text.replace("%%", "%").split()) in printed.replace("- ", "-") or text in printed, flag


def anchors(page: str) -> set[str]:
    titles = re.findall(r"^#+ (.*)", page, re.M)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", PAGES[name]):
        path, _, anchor = target.partition("#")
        there = (ROOT / name).parent / path if path else ROOT / name
        assert there.exists(), target
        assert not anchor or anchor in anchors(there.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("name", [name for name in PAGES if name != "README.md"])
def test_each_page_is_reached_and_opens_with_the_question_it_answers(name):
    linked = [page for other, page in PAGES.items() if other != name]
    assert any(f"({name})" in page or f"({name.removeprefix('docs/')})" in page for page in linked)
    assert re.match(r"# .*\?\n", PAGES[name])


OUTSIDE = {  # messages of others, that the code here does not hold
    "ChildFailedError", "exitcode: -9", "Watchdog caught collective operation timeout", "address already in use",
    "RendezvousConnectionError",
}  # fmt: skip


def texts_of_the_code() -> list[str]:
    """Every string of the code; what an f-string fills in is `…`."""
    found = []
    for path in (ROOT / "utils.py", *ROOT.glob("sft/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                found.append("".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_the_messages_of_the_troubleshooting_table_exist():
    texts = texts_of_the_code()
    table = PAGES["docs/troubleshooting.md"]
    cells = re.findall(r"^\| (.+?) \| .+ \|$", table, re.M)[1:]
    quoted = [text for cell in cells for text in re.findall(r"`([^`]+)`", cell)]
    assert len(quoted) > 15
    for text in quoted:
        if text in OUTSIDE or text == "error: …":
            continue
        pattern = ".*".join(re.escape(part) for part in text.split("…"))
        assert any(re.search(pattern, known) for known in texts), f"no code says {text!r}"


@pytest.fixture(scope="module")
def facts() -> list[list[str]]:
    with open(ROOT / "examples/facts.csv", encoding="utf-8", newline="") as file:
        return list(csv.reader(file))[1:]


@pytest.fixture(scope="module")
def demo_tokenizer(facts, tmp_path_factory):
    folder, texts = tmp_path_factory.mktemp("demo"), [text for row in facts for text in row]
    (folder / "tokenizer.model").write_bytes(make_tiny_llama.train_tokenizer(texts, vocab_size=1024))
    (folder / "config.json").write_text('{"model_type": "llama", "eos_token_id": 2}')
    return load_llama_tokenizer(ModelArguments(model_name_or_path=str(folder)))


def test_the_conversation_of_the_page_of_data_prints_what_stands_there(demo_tokenizer, tmp_path, monkeypatch, capsys):
    page = PAGES["docs/data.md"]
    monkeypatch.chdir(tmp_path)
    conversation = json.loads(re.search(r"```json\n(.*?)```", page, re.S)[1])
    Path("dialogs.jsonl").write_text(json.dumps(conversation) + "\n")
    flags = ["--data_path", "dialogs.jsonl", "--messages", "messages", "--data_cache_dir", "cache"]
    kinds = DataArguments, TrainingArguments
    parsed = transformers.HfArgumentParser(kinds).parse_args_into_dataclasses([*flags, "--output_dir", "out"])
    utils.make_supervised_data_module(demo_tokenizer, *parsed)
    assert re.search(r"```text\n(dialogs.jsonl.*?)```", page, re.S)[1] in capsys.readouterr().out


def test_the_row_becomes_the_tokens_shown(facts, demo_tokenizer):
    rows, tokenizer = facts, demo_tokenizer
    assert f"the {len(rows)} rows of [examples/facts.csv]" in README
    batch = utils.tokenize([rows[0]], tokenizer, False, 128)
    ids, prompt = batch.tokens.tolist(), int(batch.prompt_lengths[0])
    shown: dict[str, list[str]] = {"token": [], "input_ids": [], "labels": []}
    for line in re.search(r"```text\n(token .*?)```", README, re.S)[1].splitlines():
        name, *values = line.split() or ["", ""]
        shown.get(name, []).extend(values)
    assert shown["token"] == tokenizer.convert_ids_to_tokens(ids)
    assert shown["input_ids"] == [str(token) for token in ids]
    assert shown["labels"] == ["-100"] * prompt + [str(token) for token in ids[prompt:]]
    # the Alpaca prompt of the same row
    assert f"### Instruction:\n{rows[0][0]}\n\n### Response:\n```" in PAGES["docs/data.md"]


def test_the_speed_table_is_the_results_file():
    lines = (ROOT / "benchmarks/results/2026-11-24-h100-step.jsonl").read_text().splitlines()
    lines = [json.loads(line) for line in lines]
    measured = {(line["scenario"], line["variant"]): line for line in lines}
    table = RESULTS.partition("| model, recipe | variant |")[2].partition("\n\n")[0]
    rows = [[cell.strip(" *") for cell in row.split("|")[3:-1]] for row in table.splitlines()[2:]]
    for line, row in zip(lines, rows, strict=True):
        name = line["scenario"], line["variant"]
        peers = [
            line["tokens_per_s"] / measured[name[0], peer]["tokens_per_s"] for peer in ("ancestor", "trl_best_whole")
        ]
        assert float(row[0].replace(",", "")) == round(line["tokens_per_s"]), name
        assert [float(cell) for cell in row[1:3]] == pytest.approx(peers, abs=0.05), name
        assert row[3] == f"{line['ceiling_share']:.0%}".replace("%", " %"), name
        assert row[4] == f"{line['peak_memory_gib']:.1f}", name


def test_other_quoted_outputs_are_the_demos_and_the_templates():
    block = {name: re.findall(r"```text\n(.*?)```", page, re.S) for name, page in PAGES.items()}
    whole, short = block["docs/output.md"][0].splitlines(), README.partition("## What a run prints and leaves")[2]
    assert set(re.search(r"```text\n(.*?)```", short, re.S)[1].splitlines()) <= set(whole)
    assert (
        block["docs/data.md"][1]
        == template.ALPACA_TEMPLATE.replace("{instruction}", "What is the capital of Argentina?") + "\n"
    )


def test_make_demo_runs_the_demo():
    recipe = re.search(r"^demo:.*\n\t(.*)$", (ROOT / "Makefile").read_text(), re.M)[1]
    assert recipe.endswith("bash examples/demo.sh")
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in re.findall(r"`make ([a-z-]+)`", README + (ROOT / "CONTRIBUTING.md").read_text()):
        assert re.search(rf"^{target} ", listed, re.M), target


def test_the_ladder_is_the_results_file():
    measured = map(json.loads, (ROOT / "benchmarks/results/2026-11-24-h100-ladder.jsonl").read_text().splitlines())
    table = PAGES["docs/memory.md"].partition("| model | added to the command | tokens/s |")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()[2:]]
    assert len(rows) == 9
    for row, line in zip(rows, measured, strict=True):
        name, added, speed, gpu, planned, host = row
        assert name.replace(" B", "B").startswith(line["model"])
        assert added.strip("`") in line["command"]
        assert speed == f"{line['tokens_per_s']:,}"
        assert [float(gpu), float(planned)] == pytest.approx(
            [line["gpu_measured_gib"], line["gpu_planned_gib"]], abs=0.06
        )
        assert host == (f"{line['host_measured_gib']:.1f}" if line["host_measured_gib"] else ""), name


def test_the_data_table_is_the_results_file():
    lines = (ROOT / "benchmarks/results/2026-11-24-data.jsonl").read_text().splitlines()
    table = RESULTS.partition("| tokenizer | rows | rows/s |")[2].partition("\n\n")[0]
    rows = [[cell.strip() for cell in row.split("|")[2:-1]] for row in table.splitlines()[2:]]
    names = (
        "rows",
        "rows_per_s",
        "ancestor_rows_per_s",
        "speedup",
        "fraction_of_ceiling",
        "first_start_s",
        "second_start_s",
        "peak_rss_gib",
    )
    assert len(rows) == 4
    for row, line in zip(rows, map(json.loads, lines)):
        for cell, name in zip(row, names, strict=True):
            shown = float(re.sub("[^0-9.]", "", cell)) / (100 if "%" in cell else 1)
            decimals = len(cell.split(" ")[0].partition(".")[2]) + 2 * ("%" in cell)
            assert shown == pytest.approx(line[name], abs=0.51 * 10**-decimals), name


def masked(line: str) -> str:
    """Numbers that another machine, or another day, has otherwise are one sign."""
    return re.sub(r"[\d.,:]*\d\S*", "#", line)


@pytest.mark.slow
def test_the_demo_answers_as_the_readme_shows(tmp_path):
    for name in ("examples", "sft"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for name in ("llama_training.py", "utils.py"):
        shutil.copy(ROOT / name, tmp_path)
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    ended = subprocess.run(
        ["bash", "examples/demo.sh"], cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert "tuned:\nThe symbol of gold is Au.\n" in ended.stdout
    assert int(re.search(r"(\d+) of 587 questions answered exactly", ended.stdout)[1]) >= 558  # 95 %
    printed = [masked(line) for line in ended.stdout.splitlines()]
    for line in re.search(r"```text\n(.*?)```", PAGES["docs/output.md"], re.S)[1].splitlines():
        assert line == "..." or any(known.startswith(masked(line).removesuffix("...")) for known in printed), line
    for line in re.search(r"```text\n(== .*?)```", README, re.S)[
        1
    ].splitlines():  # an untrained model's answer is its machine's
        assert (
            "�" in line
            or line == "..."
            or masked(line) in map(masked, [*ended.stdout.splitlines(), *ended.stderr.splitlines()])
        ), line
    left = PAGES["docs/output.md"].partition("| in `--output_dir` | what it is |\n|---|---|\n")[2].partition("\n\n")[0]
    names = [name for line in left.splitlines() for name in re.findall(r"`([^`]+)`", line.split("|")[1])]
    assert len(names) == 10
    for name in set(names) - {"checkpoint-N/"}:
        assert (tmp_path / "demo_output/tuned" / name).is_file(), name
    bars = [line for line in ended.stderr.splitlines() if "\r" in line or "%|" in line]
    assert len(bars) <= 2, bars  # a log file holds lines: of the one bar, its start and its end

"""What a person sees of a run: live line, record, picture, comparison, card, trackers."""

import contextlib
import copy
import importlib.util
import io
import json
import math
import re
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import transformers
from huggingface_hub import ModelCard
from watched import EVALUATED, SECRET, SECRET_IN_ENVIRONMENT, TEMPLATE, flags_for, watch

import utils
from sft import generate
from sft.data.llama_tokenizer import load_llama_tokenizer
from sft.job import UserError
from sft.report import __main__, picture, progress, record
from sft.report.progress import ReportCallback
from sft.report.record import PHASES, REMOVED, Report
from sft.saving import model_card
from sft.step.packed_rows import group_by_prefix

# ------------------------------------------------------------------------------------------------------- the record

FIELDS = re.findall(r"^\| `(\S+)` \|", __main__.FIELDS_PAGE.read_text(encoding="utf-8"), re.M)


def paths(value, at=""):
    """{"a": {"b": 1}, "c": [{"d": 2}]} -> {"a.b", "c[].d"}"""
    if isinstance(value, dict) and value:
        return set().union(*(paths(item, f"{at}.{key}" if at else key) for key, item in value.items()))
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return set().union(*(paths(item, f"{at}[]") for item in value))
    return {at}


def documents(field, path):
    pattern = re.escape(field.removesuffix("?")).replace(r"\*", r"[^.]+")
    # what lies under `flags.*.*` and its like is of the user's making
    return re.fullmatch(pattern + (r"(\..*|\[\].*)?" if field.startswith(("flags", "evaluations")) else ""), path)


def test_every_field_is_documented_and_every_documented_field_is_there(watched):
    written = paths(watched.record)
    undocumented = [path for path in written if not any(documents(field, path) for field in FIELDS)]
    assert undocumented == []
    promised = [field for field in FIELDS if not field.endswith("?")]
    assert [field for field in promised if not any(documents(field, path) for path in written)] == []


def test_a_new_field_without_documentation_would_be_noticed():
    assert not any(documents(field, "log[].some_new_number") for field in FIELDS)
    assert any(documents(field, "log[].loss") for field in FIELDS)


def test_what_the_record_says_of_the_run(watched):
    record = watched.record
    assert record["status"] == "finished"
    assert record["batch"] == {
        "ranks": 1, "per_device": 2, "accumulation": 3, "examples_per_step": 6, "steps_per_epoch": 8, "steps": 8
    }  # fmt: skip
    assert [entry["step"] for entry in record["log"]] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [entry["step"] for entry in record["evaluations"]] == [0, 4, 8]
    assert record["template"]["text"] == TEMPLATE
    train = watched.trainer.train_dataset
    assert (record["data"]["train"]["kept"], record["data"]["eval"]["kept"]) == (48, 16)
    assert record["final"]["tokens"] == int(train.lengths.sum())
    assert record["final"]["trained_tokens"] == int((train.lengths - train.prompt_lengths).sum())
    shape = watched.trainer.model.config
    watched.trainer.sampler.set_epoch(0)
    shared = [
        n for batch in watched.trainer.sampler for n in group_by_prefix([train[index] for index in batch]).lengths
    ]
    assert record["final"]["shared_share"] == pytest.approx(sum(shared) / int(train.lengths.sum())) and sum(shared) > 0
    assert record["final"]["model_flops"] == by_hand(shape, train, shared)


def test_each_second_of_the_command_stands_in_one_phase(watched):
    durations = watched.record["durations_s"]
    assert set(durations) == {*PHASES} - {"checkpoints"} and min(durations.values()) >= 0
    steps = durations["first_step"] + durations["steps"]
    assert 0 < watched.record["final"]["train_steps_s"] < steps + durations["report"] + durations["train"]
    line = watched.printed.splitlines()[-1]
    printed = [float(number) for number in re.findall(r" ([\d.]+)", line)]
    assert line.startswith("seconds: start ") and line.endswith(" in all")
    assert sum(printed[:-1]) == pytest.approx(printed[-1], abs=0.05 * len(printed))
    assert printed[-1] == pytest.approx(watched.age, abs=0.03 * watched.seconds + 0.05)


def by_hand(shape, dataset, shared):
    """FLOPs of one pass over the rows of conftest's LLaMA: 2 layers, 32 wide, 64 in the MLP, 4 heads of 8, 2 key heads.

    Prefixes of `shared` tokens are computed in another example.
    """
    layer = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64
    computed = int(dataset.lengths.sum()) - sum(shared)
    trained = int((dataset.lengths - dataset.prompt_lengths).sum())
    squared = int((dataset.lengths.astype(int) ** 2).sum()) - sum(length**2 for length in shared)
    return 6 * 2 * layer * computed + 6 * 32 * shape.vocab_size * trained + 6 * 2 * 32 * squared


def test_no_secret_is_written(watched):
    texts = {path: path.read_text() for path in watched.folder.rglob("*") if path.suffix in (".json", ".md", ".txt")}
    assert {path.name for path in texts} >= {"run_report.json", "README.md"}
    assert [path for path, text in texts.items() if SECRET in text or SECRET_IN_ENVIRONMENT in text] == []
    assert watched.record["flags"]["training"]["hub_token"] == REMOVED
    assert watched.record["command"].endswith("llama_training.py --hub_token (removed) --run_name 'with (removed)'")
    assert watched.record["flags"]["training"]["average_tokens_across_devices"] is True  # not taken for a token


# ---------------------------------------------------------------------------------------------------- the live line


def test_the_printed_lines(watched):
    lines = watched.printed.splitlines()
    steps = [line for line in lines if line.startswith("step ")]
    assert len(steps) == 8
    assert re.fullmatch(
        r"step 1/8  loss \d\.\d{4}  lr 1\.00e-02  grad \d+\.\d\d  [\d,]+ tok/s/process \([\d,]+ trained\)  "
        r"padding \d+\.\d%  mem \d+\.\d\d GiB  left \d+:\d\d",
        steps[0],
    ), steps[0]
    evaluations = [line for line in lines if line.startswith("evaluation at step")]
    assert [line.split(":")[0] for line in evaluations] == [f"evaluation at step {step}" for step in (0, 4, 8)]
    assert "(lowest so far)" in evaluations[1]
    found = [entry["eval_loss"] for entry in watched.record["evaluations"]]
    lowest = (0, 4, 8)[found.index(min(found))]
    assert f"lowest evaluation loss: {min(found):.4f} at step {lowest}; the model that is saved is of step 8" in lines
    # an answer stands behind its question, without the template
    answers = [line for line in lines if re.match(r"  \S.* -> .*   \(data: ", line)]
    assert len(answers) == 6 and not any("Question:" in line or "Answer:" in line.split(" -> ")[0] for line in answers)
    assert not any("{'loss'" in line for line in lines)  # the Trainer's own printer is gone


def test_a_line_by_hand():
    logs = {"loss": 1.23456, "learning_rate": 1.98e-5, "grad_norm": 0.912, "tokens_per_s_per_gpu": 65883.4}
    logs |= {"trained_tokens_per_s_per_gpu": 31204.0, "padding_share": 0.0, "mfu": 0.4134, "peak_memory_gib": 40.127}
    assert progress.live_line(logs, 40, 300, 3725.0, "cuda") == (
        "step  40/300  loss 1.2346  lr 1.98e-05  grad 0.91  65,883 tok/s/GPU (31,204 trained)  padding 0.0%  MFU 41.3%  "
        "mem 40.13 GiB  left 1:02:05"
    )


@pytest.fixture(scope="module")
def on_a_terminal(tiny_llama, questions_csv, tmp_path_factory):
    """Four steps whose stderr is a terminal, with a tracker where one is installed."""
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    tracker = "--report_to tensorboard" if importlib.util.find_spec("tensorboard") else "--report_to none"
    folder = tmp_path_factory.mktemp("terminal") / "model"
    with contextlib.redirect_stderr(terminal):
        run = watch(
            tiny_llama, questions_csv, folder, EVALUATED, "--eval_samples 0 --max_steps 4 --disable_tqdm False", tracker
        )
    return run, terminal.getvalue()


def test_a_terminal_has_a_bar_under_the_lines(on_a_terminal):
    run, shown = on_a_terminal
    assert "4/4" in shown and "evaluating" in shown
    assert [line.split("  ")[0] for line in run.printed.splitlines() if line.startswith("step ")] == [
        "step 1/4", "step 2/4", "step 3/4", "step 4/4"
    ]  # fmt: skip


def unstarted(folder):
    """A report before anything is known, as resume and cost see it."""
    args = transformers.TrainingArguments(output_dir=str(folder), use_cpu=True, report_to="none")
    return Report(utils.ModelArguments(), utils.DataArguments(), args), args


def state_with(entries):
    log = [
        {"step": step, "epoch": step / 10, "loss": 2.0, "learning_rate": 1e-5, "grad_norm": 1.0, "step_time_s": 0.1}
        | {
            "tokens_per_s_per_gpu": 1e4,
            "trained_tokens_per_s_per_gpu": 5e3,
            "padding_share": 0.0,
            "peak_memory_gib": 1.0,
        }
        for step in range(1, entries + 1)
    ]
    state = transformers.TrainerState(log_history=log, max_steps=10**6, global_step=entries)
    state.is_world_process_zero = True
    return state


def test_a_line_costs_under_half_a_percent_of_a_step_of_100_ms(tmp_path, monkeypatch):
    """After 20,000 logged steps as after one: processor time of this thread, writing left to the next test."""
    report_, args = unstarted(tmp_path)
    monkeypatch.setattr(report_, "write", lambda spare=False: None)
    callback, state = ReportCallback(report_), state_with(20_000)
    with contextlib.redirect_stdout(io.StringIO()):
        callback.on_train_begin(args, state, None)
        began = time.thread_time()
        for _ in range(100):
            state.global_step += 1
            state.log_history.append(state.log_history[-1] | {"step": state.global_step})
            callback.on_log(args, state, None, logs=state.log_history[-1])
        seconds = (time.thread_time() - began) / 100
    assert len(report_.record["log"]) == 20_100
    assert seconds < 0.005 * 0.1, seconds


def test_writing_takes_under_half_a_percent_of_the_time(tmp_path, monkeypatch):
    """A disk that needs 3 s for the record, a picture that needs 2 s: both are written again only 400 times as late."""
    report_, _ = unstarted(tmp_path)
    now, written = [1000.0], []

    def slow(name, seconds):
        written.append((name, now[0]))
        now[0] += seconds

    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(report_, "_write_record", lambda: slow("record", 3))
    monkeypatch.setattr(record, "draw", lambda runs, path: slow("picture", 2))
    report_.write()
    while now[0] < 1000 + 4000:
        now[0] += 1
        report_.write(spare=True)
    # the first of each is before the first step, the second ten seconds later measures what the next ones take
    assert written[:4] == [("record", 1000), ("picture", 1003), ("record", 1013), ("picture", 1016)]
    spent = sum({"record": 3, "picture": 2}[name] for name, _ in written[4:])
    assert 0 < spent <= 0.005 * 4000
    assert [name for name, _ in written].count("picture") > [name for name, _ in written].count("record") > 1


def test_a_resumed_run_keeps_the_samples_of_the_steps_it_stands_on(tmp_path, capsys):
    earlier = {"samples": [{"step": 4, "answer": "a"}, {"step": 8, "answer": "b"}, {"step": 12, "answer": "c"}]}
    (tmp_path / "run_report.json").write_text(json.dumps(earlier))
    report_, args = unstarted(tmp_path)
    ReportCallback(report_).on_train_begin(args, state_with(8), None)
    written = json.loads((tmp_path / "run_report.json").read_text())
    assert [sample["answer"] for sample in written["samples"]] == ["a", "b"]
    assert [entry["step"] for entry in written["log"]] == list(range(1, 9))
    assert written["status"] == "unfinished"
    (tmp_path / "run_report.json").write_text("")  # the disk was full
    report_, args = unstarted(tmp_path)
    ReportCallback(report_).on_train_begin(args, state_with(8), None)
    assert capsys.readouterr().out.startswith(f"warning: {tmp_path / 'run_report.json'} cannot be read")


# ---------------------------------------------------------------------------------------------------------- picture


def figure_of(runs, path, monkeypatch):
    from matplotlib.figure import Figure

    figures, save = [], Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **k: figures.append(self) or save(self, *a, **k))
    picture.draw(runs, path)
    return figures[0]


def test_the_picture_of_a_run(watched, tmp_path, monkeypatch):
    figure = figure_of({"packed": watched.record}, tmp_path / "loss.png", monkeypatch)
    assert figure.get_suptitle() == "packed: tiny_llama0, 48 examples, 6 per optimizer step"
    loss, rate, speed = figure.axes
    assert loss.get_ylabel() == "loss per trained token"
    assert (rate.get_xlabel(), rate.get_ylabel()) == ("optimizer step", "learning rate")
    assert speed.get_ylabel() == "tokens/s per process"
    lines = {line.get_label(): line for line in loss.lines}
    assert list(lines) == ["train", "evaluation"]
    assert list(lines["train"].get_xdata()) == [1, 2, 3, 4, 5, 6, 7, 8]
    assert list(lines["train"].get_ydata()) == [entry["loss"] for entry in watched.record["log"]]
    assert list(lines["evaluation"].get_xdata()) == [0, 4, 8]
    shown = sorted(entry["eval_loss"] for entry in watched.record["evaluations"])
    assert sorted(text.get_text() for text in loss.texts) == sorted([f"{shown[0]:.3f}", f"{shown[-1]:.3f}"])
    assert list(rate.lines[0].get_ydata()) == [entry["learning_rate"] for entry in watched.record["log"]]
    assert (tmp_path / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert [path.name for path in tmp_path.iterdir()] == ["loss.png"]  # nothing half-written is left


def test_many_values_are_smoothed_and_gaps_stay_gaps(watched, tmp_path, monkeypatch):
    record = copy.deepcopy(watched.record) | {"status": "unfinished", "evaluations": []}
    record["log"] = [{**record["log"][0], "step": step, "loss": float(step % 2)} for step in range(1, 41)]
    record["log"][9]["loss"] = None  # a NaN as JSON holds it
    figure = figure_of({"run": record}, tmp_path / "loss.png", monkeypatch)
    raw, smooth = figure.axes[0].lines
    assert (raw.get_label(), smooth.get_label()) == ("train", "train, mean of 2 logged values")
    assert math.isnan(raw.get_ydata()[9]) and raw.get_ydata()[10] == 1.0
    assert list(smooth.get_ydata()[:3]) == [1.0, 0.5, 0.5]
    assert figure.get_suptitle().startswith("run (unfinished): ")


def test_a_running_mean():
    assert picture.running_mean([2, 4, 6], 2) == [2, 3, 5]
    assert picture.running_mean([2, math.nan, 6], 2) == [2, 2, 6]


def test_a_picture_that_fails_stops_nothing_and_is_said_once(tiny_llama, questions_csv, tmp_path, monkeypatch):
    def draw(runs, path):
        raise RuntimeError("no fonts")

    monkeypatch.setattr(record, "draw", draw)
    run = watch(tiny_llama, questions_csv, tmp_path / "model", "--max_steps 2")
    assert run.printed.count("loss.png was not written: RuntimeError: no fonts") == 1
    assert run.record["status"] == "finished" and not (run.folder / "loss.png").exists()
    assert "loss.png" not in (run.folder / "README.md").read_text()


# --------------------------------------------------------------------------------------------------- runs compared


def test_padded_and_packed_lie_on_each_other(watched, watched_padded, tmp_path, capsys):
    __main__.main([str(watched_padded.folder), str(watched.folder), "--output", str(tmp_path / "both.png")])
    printed = capsys.readouterr().out
    assert printed.startswith("| | padded | packed |\n|---|---:|---:|\n| status | finished | finished |\n")
    difference = re.search(r"padded and packed: 8 steps in both logs, losses differ by at most (\S+) \(step", printed)
    assert float(difference[1]) < 1e-5
    assert printed.endswith(f"picture: {tmp_path / 'both.png'}\n")
    assert (tmp_path / "both.png").stat().st_size > 10_000
    losses = [entry["loss"] for entry in watched.record["log"]]
    assert max(losses) - min(losses) > 0.1  # equal curves that do not move would say little


def test_runs_that_differ_are_told_apart(watched):
    other = copy.deepcopy(watched.record)
    other["log"][5]["loss"] += 0.5
    text = __main__.comparison({"a": watched.record, "b": other})
    assert text.endswith("a and b: 8 steps in both logs, losses differ by at most 5.00e-01 (step 6)")


def test_reports_that_cannot_be_compared(watched, tmp_path, monkeypatch):
    """Every folder's problem in one message: a run that logged no step, no run at all, something else, another format."""
    monkeypatch.chdir(tmp_path)
    contents = {"begun": watched.record | {"status": "unfinished", "log": []}, "list": [1], "later": {"format": 2}}
    for name, content in contents.items():
        Path(name).mkdir()
        Path(name, "run_report.json").write_text(json.dumps(content))
    Path("torn").mkdir()
    Path("torn", "run_report.json").write_text('{"format": 1,')
    with pytest.raises(UserError) as error:
        __main__.load_runs(["begun", "nowhere", "list", "later", "torn", str(watched.folder)])
    begun, nowhere, other, later, torn = error.value.problems
    assert begun == "begun/run_report.json: the run is unfinished and logged no step: there is nothing to draw."
    assert nowhere == "nowhere: there is no run_report.json in it. Give the --output_dir of a run that trained."
    assert other == "list/run_report.json: not a report that this version reads (format 1)."
    assert later == "later/run_report.json: not a report that this version reads (format 1)."
    assert torn.startswith("torn/run_report.json: not a report of a run (")


def test_an_unfinished_run_is_drawn_and_named_so(watched, tmp_path, capsys):
    (tmp_path / "begun").mkdir()
    begun = watched.record | {"status": "unfinished", "log": watched.record["log"][:3], "final": {}}
    (tmp_path / "begun" / "run_report.json").write_text(json.dumps(begun))
    __main__.main([str(tmp_path / "begun"), str(watched.folder), "--output", str(tmp_path / "both.png")])
    assert "| status | unfinished | finished |" in capsys.readouterr().out


def test_the_fields_are_printed_with_their_meaning(capsys):
    __main__.main(["--fields"])
    head, rule, *rows = capsys.readouterr().out.splitlines()
    assert (head, rule) == ("| field | meaning |", "|---|---|")
    assert [re.fullmatch(r"\| `(\S+)` \| [^|]+ \|", row)[1] for row in rows] == FIELDS
    assert "| `log[].learning_rate` | of the last step |" in rows


# ------------------------------------------------------------------------------------------------------------- card


def run_the_snippet(folder, monkeypatch):
    """What the Python in the card prints, run as a reader would."""
    monkeypatch.chdir(folder.parent)
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)[1]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    return code, printed.getvalue()


def answer_of(folder, instruction):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        generate.main(["--model", str(folder), "--instruction", instruction, "--max_new_tokens", "256"])
    return printed.getvalue()


def test_the_card(watched):
    card = (watched.folder / "README.md").read_text()
    metadata = card.split("---\n")[1]
    assert "library_name: transformers\nlicense: other\nlicense_name: as-the-base-model\n" in metadata
    assert "pipeline_tag: text-generation\ntags:\n- instruction-tuning\n- sft\n" in metadata
    assert "base_model" not in metadata and str(watched.folder.parent) not in card
    assert "\nvllm serve ./packed\n" in card and "ollama create packed -f ./packed/Modelfile\n" in card
    assert ModelCard.load(watched.folder / "README.md").data.license == "other"
    final = watched.record["final"]
    for row in (
        "| base model | `tiny_llama0` |",
        f"| training rows | 48 of 64 in `questions.csv` (blake2b `{watched.record['data']['train']['blake2b']}`) |",
        "| examples per optimizer step | 6 |",
        "| optimizer steps | 8 of 8 (1 epochs) |",
        f"| evaluation | loss {final['eval_loss']:.4f}, perplexity {final['eval_perplexity']:.4g} |",
    ):
        assert row in card
    assert f"````text\n{TEMPLATE}\n````" in card and "![loss, learning rate and speed](loss.png)" in card


def test_the_snippet_of_the_card_answers_as_the_command_does(watched, monkeypatch):
    _, printed = run_the_snippet(watched.folder, monkeypatch)
    assert printed == answer_of(watched.folder, "Name three primary colours.")


def test_the_snippet_of_an_adapter(watched_adapter, monkeypatch):
    run = watched_adapter
    code, printed = run_the_snippet(run.folder, monkeypatch)
    assert "needs `pip install peft`" in code and "library_name: peft" in (run.folder / "README.md").read_text()
    assert printed == answer_of(run.folder, "Name three primary colours.")
    assert run.record["model"]["trainable_parameters"] < run.record["model"]["parameters"] / 2


def test_the_card_names_a_base_on_the_hub_and_takes_its_licence(watched, tmp_path, monkeypatch):
    (tmp_path / "theirs.md").write_text("---\nlicense: other\nlicense_name: llama2\nlicense_link: https://x.org\n---\n")
    monkeypatch.setattr(model_card, "try_to_load_from_cache", lambda *wanted: str(tmp_path / "theirs.md"))
    template = {"name": "none", "text": "{instruction}"}
    record = watched.record | {"model": {"name": "openlm-research/open_llama_7b"}, "template": template}
    model_card.write_card(tmp_path, record, "me/mine", ["It cannot whistle."])
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.base_model, card.data.license) == ("openlm-research/open_llama_7b", "other")
    assert (card.data.license_name, card.data.license_link) == ("llama2", "https://x.org")
    assert "It was trained on whole prompts (completions)" in card.text and "\nIt cannot whistle.\n" in card.text
    assert "vllm serve me/mine\n" in card.text and "--apply_chat_template" not in card.text  # no such file there
    (tmp_path / "theirs.md").write_text("---\nlicense: [\n---\n")
    assert model_card.licence("openlm-research/open_llama_7b") == {
        "license": "other",
        "license_name": "as-the-base-model",
    }


# --------------------------------------------------------------------------------------------------------- trackers


def test_a_tracker_gets_the_names_of_the_record(on_a_terminal):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run, _ = on_a_terminal
    (events,) = run.folder.rglob("events.out.tfevents.*")
    tracked = EventAccumulator(str(events))
    tracked.Reload()
    for name in set(run.record["log"][0]) - {"step", "epoch"}:
        values = [(scalar.step, scalar.value) for scalar in tracked.Scalars(f"train/{name}")]
        assert values == [(entry["step"], pytest.approx(entry[name], rel=1e-6)) for entry in run.record["log"]], name
    for name in ("loss", "perplexity"):
        values = [(scalar.step, scalar.value) for scalar in tracked.Scalars(f"eval/{name}")]
        evaluations = run.record["evaluations"]
        assert values == [(e["step"], pytest.approx(e[f"eval_{name}"], rel=1e-6)) for e in evaluations]


def test_a_tracker_that_is_not_there(monkeypatch):
    monkeypatch.setattr(transformers.integrations, "get_available_reporting_integrations", lambda: ["tensorboard"])
    assert progress.tracker_problems(SimpleNamespace(report_to=["tensorboard", "wandb", "tensorbord"])) == [
        f"--report_to {name}: no such tracker, or its package is not installed. Usable here: tensorboard, all, none."
        for name in ("wandb", "tensorbord")
    ]
    for fine in ("none", ["all"], [], None):
        assert progress.tracker_problems(SimpleNamespace(report_to=fine)) == []


def test_a_tracker_is_refused_before_the_rows_are_read(tiny_llama, questions_csv, tmp_path, monkeypatch):
    monkeypatch.setattr(transformers.integrations, "get_available_reporting_integrations", list)
    monkeypatch.setattr(utils, "make_supervised_data_module", lambda *_: pytest.fail("the rows were read"))
    with pytest.raises(UserError, match="--report_to mlflow: no such tracker, or its package is not installed"):
        utils.train(
            load_llama_tokenizer, flags_for(tiny_llama, questions_csv, tmp_path / "model", "--report_to mlflow")
        )

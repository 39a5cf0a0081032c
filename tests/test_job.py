"""What one rank refuses, all ranks say and leave, however they were started; a rank that waits says for whom."""

import io
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jobs
import pytest
from scripts import ROOT

from sft import job, launchers
from sft.flags import parse
from sft.job import Choice, UserError, swapped

MISSING = "/no/such.csv"


@pytest.fixture
def flags(tiny_llama, questions_csv, tmp_path) -> list[str]:
    words = ["--model_name_or_path", str(tiny_llama), "--data_path", str(questions_csv)]
    words += ["--output_dir", str(tmp_path / "out"), "--data_cache_dir", str(tmp_path / "cache")]
    return [*words, "--max_steps", "2", "--save_strategy", "no"]


# ---- started by hand: RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT


def no_data_on_rank_1() -> None:
    print(f"started at {time.monotonic()}", flush=True)
    if job.rank() == 1:
        sys.argv[sys.argv.index("--data_path") + 1] = MISSING


def no_checkpoint_on_rank_1() -> None:
    """A fault that is met outside of a meeting, while the other rank goes on to the next collective."""
    from sft.saving import resume

    def choose_checkpoint(*_):
        print(f"started at {time.monotonic()}", flush=True)
        raise UserError("checkpoint-8: no such folder")

    if job.rank() == 1:
        resume.choose_checkpoint = choose_checkpoint


def no_data_on_the_second_machine() -> None:
    socket.gethostname = lambda: f"machine{job.rank()}"
    no_data_on_rank_1()


def bug_on_rank_1() -> None:
    import utils

    def load_model(*_):
        raise KeyError("a bug")

    if job.rank() == 1:
        utils.load_model = load_model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "said", "times"),
    [
        (no_data_on_rank_1, f"error: {MISSING}: No such file or directory", 1),  # before a process group exists
        (no_data_on_the_second_machine, f"error: {MISSING}: No such file or directory", 2),  # one for each terminal
        (
            no_checkpoint_on_rank_1,
            "error: checkpoint-8: no such folder",
            1,
        ),  # after
    ],
)
def test_what_one_rank_refuses_ends_all_with_one_message(flags, tmp_path, fault, said, times):
    printed = jobs.run(flags, 2, tmp_path / "log", fault, expect=2)
    took_s = time.monotonic() - min(map(float, re.findall("started at (.*)", printed)))
    assert printed.count("error: ") == printed.count(said) == times
    assert "Traceback" not in printed
    assert took_s < 10


@pytest.mark.slow
def test_a_bug_on_one_rank_ends_the_other_too(flags, tmp_path):
    ranks = jobs.Job(flags, 2, tmp_path / "log", bug_on_rank_1)
    assert ranks.wait() == [2, 1]
    assert f"error: rank 1 on {socket.gethostname()} ended with KeyError: 'a bug'" in ranks.printed()


def killed(rank: int) -> None:
    print(f"killed at {time.monotonic()}", flush=True)
    os.kill(os.getpid(), signal.SIGKILL if job.rank() == rank else 0)


def rank_1_is_killed_early() -> None:
    from sft import flags

    if job.rank() == 1:
        flags.translate = lambda argv: killed(1)


def rank_0_is_killed_early() -> None:
    """When the other has connected to its store."""
    from sft.run import prepare

    if job.rank() == 0:
        prepare.CHECKS = (lambda flags: time.sleep(0.5) or killed(0),)


def rank_1_is_killed_in_training() -> None:
    from sft.run.trainer import SupervisedTrainer

    SupervisedTrainer.training_step = lambda *_: killed(1) or time.sleep(60)


def rank_1_is_killed_on_another_machine() -> None:
    """The other rank is in no collective, whose connection would break: it waits as it does for a GPU."""
    from sft.run.trainer import SupervisedTrainer

    socket.gethostname = lambda: f"machine{job.rank()}"
    SupervisedTrainer.training_step = lambda *_: killed(1) or time.sleep(60)


def rank_0_is_killed_in_training() -> None:
    from sft.run.trainer import SupervisedTrainer

    if job.rank() == 0:
        SupervisedTrainer.training_step = lambda *_: killed(0)


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(rank_1_is_killed_early, marks=pytest.mark.slow),
        pytest.param(rank_0_is_killed_early, marks=pytest.mark.slow),
        pytest.param(rank_1_is_killed_in_training, marks=pytest.mark.slow),
        pytest.param(rank_1_is_killed_on_another_machine, marks=pytest.mark.slow),
        pytest.param(rank_0_is_killed_in_training, marks=pytest.mark.slow),
    ],
)
def test_a_rank_that_is_killed_ends_the_other(flags, tmp_path, fault):
    ranks = jobs.Job(flags, 2, tmp_path / "log", fault)
    victim = 1 if "1" in fault.__name__ else 0
    ranks.ranks[victim].join(60)
    ranks.ranks[1 - victim].join(10)
    codes = [process.exitcode for process in ranks.ranks]
    ranks.kill()
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == 2, ranks.printed()
    where = "machine1" if "machine" in fault.__name__ else socket.gethostname()
    said = ("rank 0, or torchrun's agent, has ended", f"rank 1 on {where} has ended without a word")[victim]
    assert ranks.printed().count("error: ") == ranks.printed().count(said) == 1, ranks.printed()
    assert "Traceback" not in ranks.printed()


def save_steps_differ() -> None:
    sys.argv += ["--save_steps", "7", "--cache_dir", "/elsewhere"] if job.rank() == 1 else []


def data_differs() -> None:
    if job.rank() == 1:
        path = sys.argv.index("--data_path") + 1
        other = Path(sys.argv[path]).with_name("other.csv")
        other.write_text("prompt,response\nWhat is 1 plus 1?,1 plus 1 is 2.\n")
        sys.argv[path] = str(other)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("difference", "said"),
    [
        (save_steps_differ, "error: --save_steps is 500 on rank 0 and 7.0 on another rank. Give all of them the same."),
        (data_differs, "error: data is 64 examples, "),
    ],
)
def test_ranks_that_do_not_agree_end_in_one_sentence(flags, tmp_path, difference, said):
    printed = jobs.run(flags, 2, tmp_path / "log", difference, expect=2)
    assert printed.count("error: ") == printed.count(said) == 1, printed


def waits_on_rank_1() -> None:
    from sft import flags

    launchers.SAYS_AFTER_S = 1.0
    if job.rank() == 1:
        read = flags.read_environment
        flags.read_environment = lambda *given: (time.sleep(3), read(*given))[1]


@pytest.mark.slow
def test_a_rank_says_for_whom_it_waits(flags, tmp_path):
    printed = jobs.run([*flags, "--plan_world_size", "4"], 2, tmp_path / "log", waits_on_rank_1, expect=2)
    assert re.search(rf"rank 0 has waited \d+ s for 1 of 2 ranks: rank 1 on {socket.gethostname()}\n", printed)


# ---- launchers

BREAKS_RANK_1 = f"""
import os, runpy, sys
if os.environ["RANK"] == "1":
    sys.argv[sys.argv.index("--data_path") + 1] = {MISSING!r}
sys.argv[0] = {str(ROOT / "llama_training.py")!r}
sys.path.insert(0, {str(ROOT)!r})
runpy.run_path(sys.argv[0], run_name="__main__")
"""
TORCHRUN = ["-m", "torch.distributed.run", "--rdzv_backend=c10d"]
ACCELERATE = ["-m", "accelerate.commands.launch", "--multi_gpu", "--mixed_precision=no", "--dynamo_backend=no"]
LAUNCHERS = {
    "torchrun": [[*TORCHRUN, "--nproc_per_node=2", "--rdzv_endpoint=127.0.0.1:0"]],
    "two agents": [[*TORCHRUN, "--nproc_per_node=1", "--nnodes=2", "--rdzv_id=1", "--rdzv_endpoint=127.0.0.1:PORT"]]
    * 2,
    "accelerate": [[*ACCELERATE, "--num_processes=2", "--num_machines=1", "--main_process_port=PORT"]],
    "deepspeed": [["-m", "deepspeed.launcher.runner", "--num_gpus=2", "--master_port=PORT"]],
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_launcher_ends_with_one_message(launcher, flags, tmp_path):
    script = tmp_path / "breaks_rank_1.py"
    script.write_text(BREAKS_RANK_1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    environment |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    logs: list[Path] = []
    started = []
    for number, words in enumerate(LAUNCHERS[launcher]):
        logs.append(tmp_path / f"log{number}")
        command = [sys.executable, *(word.replace("PORT", port) for word in words), str(script), *flags]
        with open(logs[-1], "w") as log:
            started.append(
                subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
            )
    try:
        codes = [process.wait(timeout=120) for process in started]
    finally:
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    printed = "".join(log.read_text() for log in logs)
    assert 0 not in codes
    assert printed.count("error: ") == printed.count(f"error: {MISSING}: No such file or directory") == 1, printed


# ---- small things


@pytest.mark.parametrize("command", [["llama_training.py"], ["xgen_training.py"], ["-m", "sft.generate"]])
def test_an_environment_that_is_not_active_is_named(command):
    ended = subprocess.run([sys.executable, "-S", *command], env={}, capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1, ended.stderr
    assert ended.stderr.startswith("error: torch, transformers, accelerate, sentencepiece: not installed for /")


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_any_text_can_be_printed_in_any_locale(encoding, monkeypatch):
    printed = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(printed, encoding=encoding))
    with job.one_message_for_user_errors():
        job.say("漢字 naïve")
    assert printed.getvalue().startswith(b"\\u6f22\\u5b57 na")


def test_what_bitsandbytes_lacks_on_a_cpu_is_not_printed():
    """transformers imports it before anything else of this project is imported."""
    name = "bitsandbytes.backends.cpu.ops"
    warns = f"import sft, logging, sys; log = logging.getLogger({name!r}); assert 'transformers' not in sys.modules; "
    warns += "log.warning('Failed to load CPU gemm_4bit_forward from %s', 'a'); log.warning('another thing')"
    ended = subprocess.run([sys.executable, "-c", warns], capture_output=True, text=True, cwd=ROOT)
    assert ended.stderr == "another thing\n"


def test_a_choice_is_printed_with_its_reason():
    assert str(Choice("compiled layers", False, "--compile_layers")) == "compiled layers: off (--compile_layers)"
    assert str(Choice("attention", "sdpa", "on a CPU")) == "attention: sdpa (on a CPU)"


def test_what_another_rank_refuses_is_raised_here(monkeypatch):
    told = []

    class Meeting:
        def exchange(self, problems):
            told.append(problems)
            return ["rank 1's problem"]

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(job, "_meeting", Meeting())
    with pytest.raises(UserError, match="rank 1"), job.all_ranks_or_none():
        pass
    with pytest.raises(UserError, match="rank 1"), job.all_ranks_or_none():
        raise UserError("mine")
    assert told == [[], ["mine"]]


def test_flags_that_differ_from_rank_0s_are_named(monkeypatch):
    class Meeting:
        def exchange(self, problems):
            return problems

        def of_rank_0(self, values):
            return values | {"--save_steps": "500"}

    monkeypatch.setattr(job, "_meeting", Meeting())
    given = ["--plan_only", "True", "--save_steps", "7", "--model_name_or_path", "m"]
    with pytest.raises(UserError) as error:
        parse(given)
    assert error.value.problems == ["--save_steps is 500 on rank 0 and 7.0 on another rank. Give all of them the same."]


def test_what_texts_need_is_printed_and_what_steers_a_terminal_is_spelled_out():
    text = "a\tb\n\u00a0\u3000 \u200c\u200d 👩\u200d👧"
    assert job.printable(text) == text
    assert job.printable("\x1b[2J\r\x07\u202e") == r"\x1b[2J\r\x07\u202e"


def test_attributes_come_back_after_an_error():
    class Args:
        seed, folder = 1, "a"

    with pytest.raises(KeyError), swapped(Args, seed=2, folder="b"):
        assert (Args.seed, Args.folder) == (2, "b")
        raise KeyError
    assert (Args.seed, Args.folder) == (1, "a")


def test_an_interrupt_ends_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(job, "_add_when_interrupted", str)
    for adds in ("", ": no step was saved"):
        with pytest.raises(SystemExit) as ended, job.one_message_for_user_errors():
            job.when_interrupted(lambda adds=adds: adds)
            raise KeyboardInterrupt
        assert ended.value.code == 130
        assert capsys.readouterr().err == f"error: interrupted{adds or '.'}\n"


@pytest.mark.slow
def test_an_interrupt_while_the_interpreter_ends_changes_nothing():
    code = "import atexit, signal; from sft.job import one_message_for_user_errors as whole; atexit.register(signal.raise_signal, 2)\nwith whole(): print('done')"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "done\n", "")


def test_an_interrupt_while_a_command_imports_ends_in_one_line():
    at_once = "import importlib.util, signal; signal.signal(2, signal.default_int_handler); importlib.util.find_spec = lambda _: signal.raise_signal(2); import sft"
    for code in (at_once, "import sft; raise KeyboardInterrupt"):
        ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
        assert ended.returncode in (130, -signal.SIGINT) and ended.stderr == "error: interrupted.\n"

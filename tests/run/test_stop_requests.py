"""Signals end a run with a checkpoint, and the command that continues it."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import jobs
import psutil
import pytest
from saved_runs import choose, flags_for, losses, same_weights, signal_at, train
from scripts import ROOT

from sft import job
from sft.run import stop_requests
from sft.saving import export


def test_the_command_to_continue(monkeypatch):
    for name in ("TORCHELASTIC_RUN_ID", "GROUP_WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    argv = ["llama_training.py", "--data_path", "my data.csv", "--resume_from_checkpoint", "out/checkpoint-3"]
    argv += [
        "--hub_token",
        "hf_SECRET",
        "--bf16",
        "True",
        "--tokens_per_micro_batch",
        "9",
        "--push-to-hub-token=hf_SECRET",
    ]
    assert stop_requests.command_to_continue(argv) == (
        "python llama_training.py --data_path 'my data.csv' '--hub_token=***' --bf16 True --tokens_per_micro_batch 9 "
        "'--push_to_hub_token=***' --resume_from_checkpoint True"
    )
    assert stop_requests.command_to_continue(["a.py", "--data_path", "https://me:pass@host/a.csv"]) == (
        "python a.py --data_path 'https://***@host/a.csv' --resume_from_checkpoint True"
    )
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    assert stop_requests.command_to_continue(["a.py"]) == (
        "torchrun --nproc_per_node=4 --nnodes=2 [your rendezvous flags] a.py --resume_from_checkpoint True"
    )


@pytest.mark.parametrize(("agreed", "step", "early"), [(True, 7, True), (True, 8, False), (False, 7, False)])
def test_a_stop_at_the_last_step_is_no_stop(agreed, step, early):
    stops = stop_requests.StopRequests()
    stops.agreed = agreed
    assert stops.ended_early(SimpleNamespace(global_step=step, max_steps=8)) is early


def test_one_press_may_arrive_twice(monkeypatch, capfd):
    """A scheduler and torchrun pass on the same request; what comes later is a second one, which stops at once."""
    now, killed = [100.0], []
    monkeypatch.setattr(stop_requests.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(stop_requests.os, "kill", lambda process, number: killed.append(number))
    monkeypatch.setattr(stop_requests.signal, "signal", lambda *_: None)
    stops = stop_requests.StopRequests()
    for now[0], times in ((100.0, 0), (101.9, 0), (102.1, 1)):
        stops._on_signal(signal.SIGTERM, None)
        assert len(killed) == times
    assert capfd.readouterr().err.count("SIGTERM: finishing this step") == 1


def test_workers_of_the_data_loaders_ignore_what_stops_the_run(watched):
    loaders = watched.trainer.get_train_dataloader(), watched.trainer.get_eval_dataloader()
    before = {number: signal.getsignal(number) for number in stop_requests.SIGNALS}
    for loader in loaders:
        loader.worker_init_fn(0)
        ignored = {signal.signal(number, handler) for number, handler in before.items()}
        assert ignored == {signal.SIG_IGN}


STEPS_THAT_LAST = ["--num_train_epochs", "50", "--save_steps", "1000", "--save_rehearsal", "False"]


class Torchrun:
    """A run of two ranks under torchrun, started in the background; `wait_for` reads its output as it comes."""

    def __init__(self, flags: list[str], log: Path, *launcher: str):
        self.log = log
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d"]
        command += ["--rdzv_endpoint=127.0.0.1:0", *launcher, str(ROOT / "llama_training.py"), *flags]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "NO_COLOR": "1"}
        with open(log, "wb") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)

    def wait_for(self, text: str, timeout_s: float = 120) -> None:
        until = time.monotonic() + timeout_s
        while text not in self.log.read_text(errors="replace"):
            assert self.process.poll() is None and time.monotonic() < until, self.log.read_text(errors="replace")
            time.sleep(0.1)

    def workers(self) -> list[int]:
        """Process ids of the ranks, in rank order."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return sorted(int(child) for child in children)

    def end(self, timeout_s: float = 120) -> tuple[int, str]:
        code = self.process.wait(timeout_s)
        return code, self.log.read_text(errors="replace")


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_with_exit_code_0_and_the_command_continues(tiny_llama, questions_csv, tmp_path):
    flags = [*flags_for(tiny_llama, questions_csv, tmp_path / "out"), *STEPS_THAT_LAST]
    job = jobs.Job(flags, 2, tmp_path / "log", TORCHELASTIC_RUN_ID="none", GROUP_WORLD_SIZE="1")
    while "step  20/" not in job.printed() and job.runs():
        time.sleep(0.1)
    os.kill(job.ranks[1].pid, signal.SIGUSR1)
    assert job.wait() == [0, 0], job.printed()
    printed = job.printed()
    step = int(re.search(r"stopped at step (\d+) of 200\. To continue:", printed)[1])
    assert choose(tmp_path / "out").endswith(f"checkpoint-{step}")
    assert printed.count("To continue:") == 1
    command = re.search(r"torchrun --nproc_per_node=2 .*llama_training\.py .* --resume_from_checkpoint True", printed)[
        0
    ]
    assert str(questions_csv) in command
    assert not (tmp_path / "out" / "COMPLETE.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_torchrun_passes_a_signal_on_and_waits_for_the_checkpoint(tiny_llama, questions_csv, tmp_path, number):
    flags = [*flags_for(tiny_llama, questions_csv, tmp_path / "out"), *STEPS_THAT_LAST]
    job = Torchrun(flags, tmp_path / "log")
    job.wait_for("step  20/")
    job.process.send_signal(number)
    code, printed = job.end()
    assert_stopped_by(number.name, printed, tmp_path / "out")
    # torchrun (2.13), as docs/several_machines.md says
    assert code == 1 and "(torchrun, if it got the signal too, prints a traceback now and exits with code 1." in printed


def runs(process: int) -> bool:
    return psutil.pid_exists(process) and psutil.Process(process).status() != psutil.STATUS_ZOMBIE


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_workers_end_with_a_launcher_that_is_killed(tiny_llama, questions_csv, tmp_path, processes):
    flags = [*flags_for(tiny_llama, questions_csv, tmp_path / "out"), *STEPS_THAT_LAST]
    job = Torchrun(flags, tmp_path / "log", f"--nproc_per_node={processes}")
    job.wait_for("step  20/")
    workers = job.workers()
    job.process.kill()
    until = time.monotonic() + 10
    while alive := [worker for worker in workers if runs(worker)]:
        assert time.monotonic() < until, alive
        time.sleep(0.1)
    assert len(workers) == processes
    printed = job.end()[1]
    # the first to notice stops them all
    assert re.search(r"error: the launcher of rank \d has ended, and so does this rank\.", printed)
    assert "frame #" not in printed  # of C++, from the clients of the launcher's store
    assert choose(tmp_path / "out") is not None  # the step was finished and saved


def the_launcher_dies() -> None:
    """When this rank, started by no launcher, is in the middle of what DIES_IN names and stays there."""
    import utils

    place, parent, dead = os.environ["DIES_IN"], os.getppid(), []
    job.os.getppid = lambda: 1 if dead else parent

    def stay(*_, **__):
        dead.append(time.monotonic())
        print(f"the launcher dies at {dead[0]}", flush=True)
        time.sleep(60)

    from sft.run.trainer import SupervisedTrainer
    from sft.saving import checkpoint

    home, name = {
        "a step": (SupervisedTrainer, "training_step"),
        "a save": (checkpoint, "digest"),
        "the data": (utils, "tokenize_file"),  # a pool of processes does what is below it
    }[place]
    setattr(home, name, stay)


@pytest.mark.slow
@pytest.mark.parametrize("place", ["the data", "a step", "a save"])
def test_a_worker_ends_with_its_launcher_whatever_it_is_doing(tiny_llama, questions_csv, tmp_path, place):
    flags = flags_for(tiny_llama, questions_csv, tmp_path / "out", "--save_rehearsal", "False")
    flags += ["--data_cache_dir", str(tmp_path / "cache")]
    rank = jobs.Job(flags, 1, tmp_path / "log", the_launcher_dies, TORCHELASTIC_RUN_ID="none", DIES_IN=place)
    (code,), ended = rank.wait(), time.monotonic()
    printed = rank.printed()
    assert code != 0 and "error: the launcher of rank 0 has ended, and so does this rank." in printed
    assert ended - float(re.search("the launcher dies at (.*)", printed)[1]) < 10
    assert "Traceback" not in printed and choose(tmp_path / "out") is None


@pytest.mark.slow
def test_sigterm_during_a_save_finishes_it(tiny_llama, questions_csv, tmp_path, monkeypatch, capsys):
    from sft.saving import checkpoint

    real, sent = checkpoint.digest, []

    def digest(path):
        if not sent:
            sent.append(path)
            os.kill(os.getpid(), signal.SIGTERM)
        return real(path)

    monkeypatch.setattr(checkpoint, "digest", digest)
    trainer = train(*flags_for(tiny_llama, questions_csv, tmp_path / "out", "--save_rehearsal", "False"))
    assert "/incomplete/checkpoint-3/" in str(sent[0])
    assert trainer.state.global_step == 4 and "stopped at step 4 of 16" in capsys.readouterr().out
    assert [checkpoint.why_not_whole(tmp_path / "out" / f"checkpoint-{step}") for step in (3, 4)] == [None, None]
    assert not list((tmp_path / "out").glob("incomplete*"))


@pytest.mark.slow
def test_an_interrupt_of_all_ranks_waits_for_the_checkpoint(tiny_llama, questions_csv, tmp_path):
    """As a terminal's Ctrl-C reaches them."""
    flags = [*flags_for(tiny_llama, questions_csv, tmp_path / "out"), *STEPS_THAT_LAST]
    job = jobs.Job(flags, 2, tmp_path / "log")
    while "step  20/" not in job.printed() and job.runs():
        time.sleep(0.1)
    for rank in job.ranks:
        os.kill(rank.pid, signal.SIGINT)
    assert job.wait() == [0, 0], job.printed()
    assert_stopped_by("SIGINT", job.printed(), tmp_path / "out")


def assert_stopped_by(name: str, printed: str, output: Path) -> None:
    assert f"{name}: finishing this step and saving a checkpoint" in printed
    step = int(re.search(r"stopped at step (\d+) of 200\. To continue:", printed)[1])
    assert choose(output).endswith(f"checkpoint-{step}")


def never_finish_a_step_after_the_third() -> None:
    from sft.run.trainer import SupervisedTrainer

    real = SupervisedTrainer.training_step

    def training_step(self, *args, **kwargs):
        if self.state.global_step == 3:
            print("stuck", flush=True)
            time.sleep(60)
        return real(self, *args, **kwargs)

    SupervisedTrainer.training_step = training_step


@pytest.mark.slow
def test_a_second_signal_stops_at_once(tiny_llama, questions_csv, tmp_path):
    flags = flags_for(tiny_llama, questions_csv, tmp_path / "out", "--save_steps", "3")
    job = jobs.Job(flags, 1, tmp_path / "log", never_finish_a_step_after_the_third)
    while "stuck" not in job.printed():
        time.sleep(0.1)
    (rank,) = job.ranks
    os.kill(rank.pid, signal.SIGTERM)
    os.kill(rank.pid, signal.SIGTERM)  # the same request, passed on twice
    time.sleep(stop_requests.ONE_PRESS_S + 0.5)
    assert rank.is_alive()
    os.kill(rank.pid, signal.SIGTERM)
    rank.join(5)
    assert rank.exitcode == -signal.SIGTERM
    assert "stopped at step" not in job.printed()
    assert choose(tmp_path / "out").endswith("checkpoint-3")  # the one before stays


@pytest.mark.slow
def test_torchrun_restarts_a_killed_worker_and_the_weights_are_those_of_a_quiet_run(
    tiny_llama, questions_csv, tmp_path
):
    more = ["--num_train_epochs", "25", "--save_steps", "40", "--resume_from_checkpoint", "True"]
    quiet, disturbed = (flags_for(tiny_llama, questions_csv, tmp_path / name, *more) for name in ("quiet", "disturbed"))
    jobs.run(quiet, 2, tmp_path / "quiet.log")
    job = Torchrun(disturbed, tmp_path / "log", "--max_restarts=3")
    job.wait_for("step  45/")
    first = job.workers()
    os.kill(first[1], signal.SIGKILL)
    job.wait_for("checkpoint-40\n")
    job.wait_for("step  85/")
    second = job.workers()
    assert not set(first) & set(second)
    os.kill(second[0], signal.SIGKILL)
    code, printed = job.end()
    assert code == 0, printed
    resumed = re.findall(r"resume: \S+/checkpoint-(\d+)\n", printed)
    assert resumed[0] == "40"
    assert resumed[1:] in (["80"], ["120"])  # a quick machine is further on by the time that the kill arrives
    assert losses(tmp_path / "disturbed") == losses(tmp_path / "quiet")
    assert same_weights(tmp_path / "disturbed", tmp_path / "quiet")
    assert (tmp_path / "disturbed" / export.COMPLETE).is_file()


def test_a_stop_that_could_not_be_saved_says_what_is_lost_and_fails(
    tiny_llama, questions_csv, tmp_path, monkeypatch, capsys
):
    from sft.saving import checkpoint

    signal_at(monkeypatch, 5)
    real = checkpoint.too_little_space
    monkeypatch.setattr(checkpoint, "too_little_space", lambda folder, step: step == 5 or real(folder, step))
    with pytest.raises(SystemExit) as ended:
        train(*flags_for(tiny_llama, questions_csv, tmp_path / "out"))
    assert ended.value.code == 4
    printed = capsys.readouterr().err
    assert (
        "stopped at step 5 of 16, and checkpoint-5 was not saved" in printed and "checkpoint-3 is the newest" in printed
    )


@pytest.mark.slow
def test_sighup_stops_like_sigterm_unless_it_is_ignored(tiny_llama, questions_csv, tmp_path, monkeypatch, capsys):
    signal_at(monkeypatch, 2, signal.SIGHUP)
    monkeypatch.setattr(stop_requests, "ONE_PRESS_S", 100)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    try:
        train(*flags_for(tiny_llama, questions_csv, tmp_path / "out"))
        assert "stopped at step 2 of 16. To continue:" in capsys.readouterr().out
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup leaves it
        trainer = train(*flags_for(tiny_llama, questions_csv, tmp_path / "nohup", "--max_steps", "3"))
        assert trainer.state.global_step == 3
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.fixture
def handlers():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("place", "stopped_at", "said"),
    [
        ("utils.make_supervised_data_module", None, ": no step was saved"),
        ("sft.plan.settle.settle", None, ": no step was saved"),
        (
            "sft.saving.export.Exporter.prove",
            None,
            ": checkpoint-3 is the newest checkpoint. To continue: python a.py ",
        ),
        ("sft.report.record.Report.finish", 2, ": checkpoint-2 is the newest checkpoint. To continue: python a.py "),
    ],
)
def test_ctrl_c_before_the_first_step_after_the_last_save_and_in_the_export_ends_in_one_line(
    tiny_llama, questions_csv, tmp_path, monkeypatch, capsys, handlers, place, stopped_at, said
):
    if stopped_at:
        signal_at(monkeypatch, stopped_at)
    monkeypatch.setattr(place, lambda *_, **__: os.kill(os.getpid(), signal.SIGINT) or time.sleep(5))
    monkeypatch.setattr("sys.argv", ["a.py", "--data_path", "d.csv"])
    flags = flags_for(tiny_llama, questions_csv, tmp_path / "out", "--max_steps", "3", "--save_rehearsal", "False")
    with pytest.raises(SystemExit) as ended, job.one_message_for_user_errors():
        train(*flags)
    printed = capsys.readouterr().err
    assert ended.value.code == 130
    (line,) = [line for line in printed.splitlines() if "interrupted" in line]
    assert line.startswith(f"error: interrupted{said}") and "Traceback" not in printed
    assert ("--resume_from_checkpoint True" in line) == ("To continue" in said)

"""Tokenized once for each machine: hits, misses, killed builders, two at once, damaged files, full disks."""

import csv
import json
import multiprocessing
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jobs
import numpy as np
import pytest
from characters import character_tokenizer
from rows_at_hand import problems_of
from scripts import ROOT

import utils
from sft.data import files, token_cache
from sft.flags import DataArguments
from sft.job import UserError

KEY = {"csv": "of these tests"}
FORK = multiprocessing.get_context("fork")  # a process of its own without importing everything again


def batch(*rows: list[int]) -> token_cache.Batch:
    """Kept rows with a prompt of one token each."""
    lengths = np.array([len(row) for row in rows], np.int32)
    tokens = np.array([token for row in rows for token in row], np.int32)
    return token_cache.Batch(tokens, lengths, np.ones_like(lengths), np.zeros(len(rows), np.uint8))


class Builder:
    """Builds two batches and counts, over all processes, how often it was begun and ended; it can wait or fail between them."""

    def __init__(self, folder, pause=lambda: None):
        self.folder, self.pause = folder, pause

    def __call__(self):
        self._note("begun")
        yield batch([1, 2], [3, 4, 5])
        self.pause()
        yield batch([6, 7])
        self._note("ended")

    def _note(self, what):
        with open(self.folder / what, "a") as file:
            file.write("x")

    def count(self, what) -> int:
        return len((self.folder / what).read_text()) if (self.folder / what).exists() else 0


def load(tmp_path, builder) -> token_cache.TokenizedRows:
    return token_cache.load_or_build(tmp_path / "cache", KEY, builder)


def assert_whole(rows):
    assert rows.tokens.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert rows.offsets.tolist() == [0, 2, 5] and rows.lengths.tolist() == [2, 3, 2]
    assert rows.row_numbers.tolist() == [2, 3, 4] and rows.largest_id == 7


def wait_until(happened, seconds=20):
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end
        time.sleep(0.01)


def in_processes(count, function) -> list:
    """Call function(index) in processes of their own, at once; return their results."""
    results = FORK.Queue()
    processes = [FORK.Process(target=lambda i=i: results.put((i, function(i)))) for i in range(count)]
    for process in processes:
        process.start()
    found = dict(results.get(timeout=30) for _ in processes)
    for process in processes:
        process.join(30)
    return [found[i] for i in range(count)]


# ------------------------------------------------------------------------------------------------- hit and miss


@pytest.fixture
def tokenized(tmp_path, monkeypatch):
    """Make the rows of a CSV and tell how often that read them to tokenize them."""
    calls = []
    read_batches = files.read_batches
    monkeypatch.setattr(files, "read_batches", lambda *args: calls.append(args) or read_batches(*args))

    def tokenized(path, tokenizer=None, max_length=64, **flags) -> int:
        calls.clear()
        data_args = DataArguments(data_path=str(path), data_cache_dir=str(tmp_path / "cache"), **flags)
        utils.tokenize_file(str(path), tokenizer or character_tokenizer(), data_args, max_length)
        return len(calls)

    return tokenized


def test_a_second_start_tokenizes_nothing(tmp_path, tokenized):
    path = tmp_path / "data.csv"
    path.write_text("prompt,response\na,b\n")
    assert tokenized(path) == 1
    assert tokenized(path) == 0
    copy = tmp_path / "copy.csv"  # the bytes count, neither name nor time
    copy.write_bytes(path.read_bytes())
    assert tokenized(copy) == 0


@pytest.mark.parametrize(
    "part", ["csv", "source", "target", "template", "tokenizer", "max_length", "control", "version", "libraries"]
)
def test_each_part_of_the_key_is_a_miss(tmp_path, tokenized, monkeypatch, part):
    path, template = tmp_path / "data.csv", tmp_path / "template.txt"
    path.write_text("prompt,other,response\na,b,c\n")
    template.write_text("{instruction}!")
    assert tokenized(path) == 1
    other = {}
    if part == "csv":
        path.write_text("prompt,other,response\na,b,d\n")
    if part == "version":
        monkeypatch.setattr(token_cache, "VERSION", token_cache.VERSION + 1)
    if part == "libraries":
        monkeypatch.setattr(utils.tokenizers, "__version__", "another")
    if part in ("source", "target"):
        other = {part: "other"}
    if part == "template":
        other = {"prompt_template": str(template)}
    if part == "tokenizer":
        other = {"tokenizer": character_tokenizer("ab")}
    if part == "max_length":
        other = {"max_length": 63}
    if part == "control":
        other = {"allow_control_tokens": True}
    assert tokenized(path, **other) == 1
    assert tokenized(path, **other) == 0


def test_a_tokenizer_is_known_by_its_content():
    digest = token_cache.tokenizer_digest(character_tokenizer())
    used = character_tokenizer()
    used(["a", "abc"], padding=True, truncation=True, max_length=2)  # leaves its settings in the backend
    assert token_cache.tokenizer_digest(used) == digest
    assert token_cache.tokenizer_digest(character_tokenizer("ab")) != digest
    other_eos = character_tokenizer()
    other_eos.eos_token = "<pad>"
    assert token_cache.tokenizer_digest(other_eos) != digest


def test_default_place(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "sft-tokenized-rows"
    folder.mkdir(mode=0o777)
    assert token_cache.default_cache_dir() == folder
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700  # nobody else's rows, and nobody else's eyes
    monkeypatch.setattr(os, "getuid", lambda: folder.stat().st_uid + 1)
    with pytest.raises(UserError, match=r"belongs to another user. Name a folder of your own with --data_cache_dir"):
        token_cache.default_cache_dir()


# ------------------------------------------------------------------------------------- killed, and at the same time


def test_a_killed_builder_leaves_nothing_that_counts(tmp_path):
    builder = Builder(tmp_path, pause=signal.pause)
    process = FORK.Process(target=load, args=(tmp_path, builder))
    process.start()
    wait_until(lambda: list(tmp_path.glob("cache/*.building/tokens.bin")) and builder.count("begun"))
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert list(tmp_path.glob("cache/*.building"))
    assert_whole(load(tmp_path, Builder(tmp_path)))
    assert builder.count("begun") == 2 and builder.count("ended") == 1
    assert not list(tmp_path.glob("cache/*.building"))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="threads elsewhere")
def test_the_children_of_a_killed_builder_end_and_hold_no_lock(tmp_path):
    children = tmp_path / "children"

    def note_and_wait(number):
        with open(children, "a") as file:
            file.write(f"{os.getpid()}\n")
        time.sleep(60 if number else 0)
        return batch([1, 2])

    killed = FORK.Process(target=load, args=(tmp_path, lambda: token_cache.map_ahead(note_and_wait, range(50))))
    killed.start()
    wait_until(lambda: children.exists() and len(children.read_text().split()) > 1)
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    assert_whole(load(tmp_path, Builder(tmp_path)))
    wait_until(lambda: not any(Path("/proc", pid).exists() for pid in children.read_text().split()))


def test_of_several_processes_one_builds_and_all_have_the_rows(tmp_path):
    builder = Builder(tmp_path, pause=lambda: time.sleep(0.3))

    def work(index):
        rows = load(tmp_path, builder)
        assert_whole(rows)
        return rows.folder

    assert len(set(in_processes(4, work))) == 1
    assert builder.count("begun") == 1


def test_who_waits_for_a_killed_builder_builds(tmp_path):
    note = tmp_path / "cache" / f"{Path(load(tmp_path, Builder(tmp_path)).folder).name}.error"
    shutil.rmtree(note.with_suffix(""))
    (tmp_path / "ended").unlink()
    note.write_text('["an earlier build ended so"]')
    stuck = FORK.Process(target=load, args=(tmp_path, Builder(tmp_path, pause=signal.pause)))
    stuck.start()
    wait_until(lambda: list(tmp_path.glob("cache/*.building/tokens.bin")))

    def work(index):
        if index == 0:
            time.sleep(0.3)  # the others wait for the lock by now
            os.kill(stuck.pid, signal.SIGKILL)
        assert_whole(load(tmp_path, Builder(tmp_path)))

    in_processes(3, work)
    assert Builder(tmp_path).count("ended") == 1


@pytest.mark.slow
def test_who_waited_ends_in_the_builders_error(tmp_path):
    def fail():
        time.sleep(0.5)
        raise UserError(["data.csv, row 7: broken.", "data.csv, row 9: broken."])

    def work(index):
        with pytest.raises(UserError) as caught:
            load(tmp_path, Builder(tmp_path, pause=fail))
        return caught.value.problems

    assert in_processes(3, work) == [["data.csv, row 7: broken.", "data.csv, row 9: broken."]] * 3
    assert Builder(tmp_path).count("begun") == 1
    assert_whole(in_processes(1, lambda index: load(tmp_path, Builder(tmp_path)))[0])  # a later process tries again
    assert not list(tmp_path.glob("cache/*.error"))


def test_ctrl_c_is_the_parents_to_answer():
    """A terminal sends it to the workers too, and each would print a traceback."""
    assert list(token_cache.map_ahead(lambda _: signal.getsignal(signal.SIGINT), [0, 1])) == [signal.SIG_IGN] * 2


def test_one_batch_starts_no_process():
    assert list(token_cache.map_ahead(lambda _: os.getpid(), [0])) == [os.getpid()]


def test_waiting_is_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(token_cache, "QUIET_WAIT_S", 0.1)
    builder = FORK.Process(target=load, args=(tmp_path, Builder(tmp_path, pause=lambda: time.sleep(0.5))))
    builder.start()
    wait_until(lambda: list(tmp_path.glob("cache/*.building")))
    rows = load(tmp_path, Builder(tmp_path))
    assert_whole(rows)
    said = capsys.readouterr().out
    assert said == f"data: another process is tokenizing the same rows; waiting for it ({rows.folder}.lock)\n"


# ---------------------------------------------------------------------------------------------------- damaged files


@pytest.mark.parametrize("name", ["tokens.bin", "lengths.npy", "prompt_lengths.npy", "outcomes.npy", "meta.json"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "removed"])
def test_a_damaged_entry_is_built_again(tmp_path, capsys, name, damage):
    builder = Builder(tmp_path)
    entry = load(tmp_path, builder).folder
    path = Path(entry, name)
    content = bytearray(path.read_bytes())
    if damage == "removed":
        path.unlink()
    else:
        if damage == "flipped" and name == "meta.json":
            content[content.index(b'"files"') + 1] ^= 1
        elif damage == "flipped":
            content[-1] ^= 1
        path.write_bytes(content if damage == "flipped" else content[:-1])
    assert_whole(load(tmp_path, builder))
    assert builder.count("begun") == 2
    assert capsys.readouterr().out == f"data: the tokenized rows in {entry} are damaged; building them again\n"
    assert_whole(load(tmp_path, builder))
    assert builder.count("begun") == 2


@pytest.mark.parametrize("change", [{"key": {"csv": "of others"}}, {"files": {}}, {"largest_id": "many"}, {"key": [1]}])
def test_an_entry_that_is_not_what_its_name_says_is_built_again(tmp_path, change):
    builder = Builder(tmp_path)
    meta = Path(load(tmp_path, builder).folder, "meta.json")
    meta.write_text(json.dumps(json.loads(meta.read_text()) | change))
    assert_whole(load(tmp_path, builder))
    assert builder.count("begun") == 2


def test_nothing_is_written_through_a_link_that_lies_in_the_folder(tmp_path):
    entry = Path(load(tmp_path, Builder(tmp_path)).folder)
    shutil.rmtree(entry)
    precious, folder = tmp_path / "precious", tmp_path / "folder"
    precious.write_text("mine")
    folder.mkdir()
    (folder / "tokens.bin").write_text("mine")
    links = [entry.with_suffix(".error"), entry.with_suffix(".building"), entry]
    for link in links:
        link.symlink_to(precious if link.suffix == ".error" else folder)

    def fail():
        raise UserError("data.csv, row 7: broken.")

    with pytest.raises(UserError, match="row 7: broken"):
        load(tmp_path, Builder(tmp_path, pause=fail))
    assert_whole(load(tmp_path, Builder(tmp_path)))
    assert precious.read_text() == (folder / "tokens.bin").read_text() == "mine"


@pytest.mark.parametrize(
    ("content", "seconds", "problems"),
    [
        ('["a", "b"]', 0, ["a", "b"]),
        ('["a"]', 3600, []),  # from the future: no build of ours wrote it
        ('["a"]', -3600, []),  # of an earlier build
        ('{"a": 1}', 0, []),
        ("[1]", 0, []),
        ("[" * 100_000, 0, []),
        ("", 0, []),
    ],
)
def test_only_a_fresh_note_of_sentences_counts(tmp_path, content, seconds, problems):
    note, now = tmp_path / "x.error", time.time()
    note.write_text(content)
    os.utime(note, (now + seconds,) * 2)
    assert token_cache._noted(note, now - 5) == problems


def test_rows_that_are_in_use_survive_a_rebuild(tmp_path):
    rows = load(tmp_path, Builder(tmp_path))
    os.remove(os.path.join(rows.folder, "meta.json"))
    load(tmp_path, Builder(tmp_path))
    assert_whole(rows)


# ------------------------------------------------------------------------------------------- what cannot be written


@pytest.fixture
def public_folder():
    """A folder that another user can reach, unlike pytest's own."""
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o755)
        yield Path(name)


def message(tmp_path, reason) -> str:
    return (
        f"{tmp_path}: the tokenized rows cannot be written here: {reason}. Name a folder on another disk with "
        "--data_cache_dir, or make room: this folder can be deleted at any time."
    )


def test_a_full_disk(tmp_path, monkeypatch):
    builder = Builder(tmp_path)

    def open_on_a_full_disk(path, mode="r"):
        return open("/dev/full" if str(path).endswith("tokens.bin") and "w" in mode else path, mode)

    monkeypatch.setattr(token_cache, "open", open_on_a_full_disk, raising=False)
    with pytest.raises(UserError) as caught:
        load(tmp_path, builder)
    assert caught.value.problems == [message(tmp_path / "cache", "No space left on device")]
    assert not list((tmp_path / "cache").glob("*.building"))
    monkeypatch.undo()
    assert_whole(load(tmp_path, builder))  # in the same process, once there is room


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as caught:
        token_cache.load_or_build(tmp_path / "file" / "cache", KEY, Builder(tmp_path))
    assert caught.value.problems == [message(tmp_path / "file" / "cache", "Not a directory")]


def test_a_read_only_folder_serves_what_it_has_and_refuses_the_rest(public_folder):
    load(public_folder, Builder(public_folder))
    (public_folder / "cache").chmod(0o555)

    def work(index):
        if os.geteuid() == 0:  # root writes everywhere
            os.setuid(65534)
        assert_whole(load(public_folder, None))  # which builds nothing
        with pytest.raises(UserError) as caught:
            token_cache.load_or_build(public_folder / "cache", {"csv": "another"}, Builder(public_folder))
        return caught.value.problems

    assert in_processes(1, work) == [[message(public_folder / "cache", "Permission denied")]]
    (public_folder / "cache").chmod(0o755)


# ----------------------------------------------------------------------------------------------- size, and the scripts

MEASURE = """
import sys
sys.path[:0] = sys.argv[1:3]
import utils
from characters import character_tokenizer
from sft.data.files import DataFile
from sft.data.mixture import Part
from sft.flags import DataArguments
def peak(path):
    rows = utils.tokenize_file(path, character_tokenizer(), DataArguments(data_path=path, data_cache_dir=sys.argv[5]), 4096)
    dataset = utils.SupervisedDataset([Part.of(DataFile(path), rows)])
    sum(len(dataset[i]["input_ids"]) for i in range(100))
    high = open("/proc/self/status").read().split("VmHWM:")[1].split()[0]  # ru_maxrss would begin with the parent's
    print(int(high) // 1024, rows.tokens.nbytes // 2**20)
peak(sys.argv[3])
peak(sys.argv[4])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="memory is read from /proc")
def test_memory_does_not_grow_with_the_file(tmp_path):
    paths = []
    for rows in (10_000, 40_000):
        paths.append(str(tmp_path / f"{rows}.csv"))
        with open(paths[-1], "w", newline="") as file:
            csv.writer(file).writerows(
                [("prompt", "response"), *((f"question {n}", "answer " * 200) for n in range(rows))]
            )
    command = [
        sys.executable,
        "-c",
        MEASURE,
        str(ROOT),
        str(ROOT / "tests" / "support"),
        *paths,
        str(tmp_path / "cache"),
    ]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    (small, small_file), (large, large_file) = (map(int, line.split()) for line in ended.stdout.splitlines())
    assert large_file - small_file > 150  # MiB on disk
    assert large - small < 60  # MiB in memory: buffers that the first did not fill


@pytest.mark.slow
def test_two_ranks_tokenize_once_and_end_in_one_message(tmp_path, tiny_llama, questions_csv):
    flags = ["--model_name_or_path", str(tiny_llama), "--data_path", str(questions_csv), "--check_data", "True"]
    flags += ["--output_dir", str(tmp_path / "out"), "--data_cache_dir", str(tmp_path / "cache")]
    printed = jobs.run(flags, 2, tmp_path / "log")
    assert len(re.findall(r"tokenizing \S+: 100%", printed)) == 1
    assert printed.count("64 rows read") == 1
    assert len(list((tmp_path / "cache").glob("*/tokens.bin"))) == 1
    assert json.loads((tmp_path / "out" / "data_report.json").read_text())["counts"]["kept"] == 64

    broken = tmp_path / "broken.csv"
    broken.write_text("prompt,response\na,b\nc,d\ne\n")
    flags[3] = str(broken)
    printed = jobs.run(flags, 2, tmp_path / "broken.log", expect=2)
    assert printed.count(f"error: {broken}, row 4: 1 field where the header has 2.") == printed.count("error: ") == 1


def test_work_ahead_keeps_its_order_and_its_bound():
    taken = []

    def items():
        for item in range(200):
            taken.append(item)
            yield item

    def square_there(item):
        time.sleep(0.002)
        return item * item, os.getpid()

    results = token_cache.map_ahead(square_there, items())  # a local function: it is inherited, not sent
    first = next(results)[0], next(results)[0]
    assert first == (0, 1) and len(taken) <= 2 + 1 + 2 * os.cpu_count()
    squares, processes = zip(*results)
    assert squares == tuple(item * item for item in range(2, 200))
    if sys.platform == "linux":
        assert os.getpid() not in processes and len(set(processes)) == len(os.sched_getaffinity(0))


def test_work_ahead_hands_on_a_users_mistake():
    def fail(item):
        raise UserError([f"row {item}: wrong.", "and more."])

    assert problems_of(lambda: list(token_cache.map_ahead(fail, range(3)))) == ["row 0: wrong.", "and more."]


def test_where_training_pauses_is_counted_from_the_first_batch_on(tmp_path):
    pauses = [batch([1, 2, 3, 4])._replace(switches=np.array([2, 3])) for _ in range(2)]
    rows = token_cache.load_or_build(tmp_path, KEY, lambda: iter(pauses))
    assert (rows.switches.tolist(), rows.trained.tolist()) == ([2, 3, 6, 7], [2, 2])


def test_a_note_is_never_written_through_a_link_that_another_user_puts_there(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("kept")

    def build():
        (entry,) = tmp_path.glob("*.lock")
        entry.with_suffix(".error").symlink_to(precious)
        raise UserError("a fault")
        yield

    with pytest.raises(UserError, match="a fault"):
        token_cache.load_or_build(tmp_path, KEY, build)
    assert precious.read_text() == "kept"

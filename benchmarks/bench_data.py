"""How fast a file becomes tokenized rows: beside the ancestor's way, and beside the bare call of the tokenizer.

    python benchmarks/bench_data.py --data_path open_instruct_v1.csv --tokenizer MODEL_FOLDER
    python benchmarks/bench_data.py --data_path open_instruct_v1.csv --tokenizer MODEL_FOLDER --rows 1000000

Prints one JSON line. Ours is all that a run does before it has its dataset: digests, reading, tokens and labels, writing,
syncing, opening. The three are measured in turn, several times, on the first rows of the file; the medians count. More
rows than the file's are its rows again and again, each time with other rare words, tokenized once.
"""

import argparse
import copy
import csv
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, redirect_stdout
from itertools import count, islice
from pathlib import Path

import psutil
import pyarrow
import torch
from pyarrow import parquet

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import utils
from sft.data.encode import words_of
from sft.data.files import DataFile, read_rows
from sft.data.llama_tokenizer import load_llama_tokenizer
from sft.data.mixture import Part
from sft.flags import DataArguments, ModelArguments

ROWS_COMPARED = 10_000  # by the ancestor, the bare call and us in turn
GIB = 2**30


# What follows up to `measure` runs in processes of their own, so that none finds another's memory in its way.
own = argparse.Namespace()


def begin(args: argparse.Namespace, path: str) -> None:
    own.memory_of_imports = psutil.Process().memory_full_info()
    own.args, own.path = args, path
    with redirect_stdout(sys.stderr):
        own.tokenizer = load_llama_tokenizer(ModelArguments(model_name_or_path=args.tokenizer))


def seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    result = function()
    duration = time.perf_counter() - start
    del result  # freed outside the measurement, in favour of those that return much
    return duration


def ancestor() -> float:
    """The ancestor's method: one text at a time, each prompt twice, a tensor at once, lengths counted by the pad id."""
    rows, tokenizer = pairs_of(own.args, own.path), own.tokenizer

    def encode(text: str) -> tuple[torch.Tensor, int]:
        input_ids = tokenizer(
            text, return_tensors="pt", padding="longest", max_length=own.args.model_max_length, truncation=True
        ).input_ids[0]
        return input_ids, int(input_ids.ne(tokenizer.pad_token_id).sum())

    def preprocess() -> list[dict[str, torch.Tensor]]:
        examples = []
        for prompt, response in rows:
            (input_ids, _), (_, prompt_length) = encode(prompt + response + tokenizer.eos_token), encode(prompt)
            labels = copy.deepcopy(input_ids)
            labels[:prompt_length] = utils.IGNORE_INDEX
            examples.append({"input_ids": input_ids, "labels": labels})
        return examples

    return seconds(preprocess)


def bare_call() -> float:
    """Nothing but the tokenizer's fastest call, on all prompts and on all responses; the ids are not even looked at."""
    prompts, responses = zip(*pairs_of(own.args, own.path))
    encode = own.tokenizer.backend_tokenizer.encode_batch_fast
    return seconds(lambda: (encode(prompts), encode(responses, add_special_tokens=False)))


def ours() -> float:
    """All that a run does before it has its first example, where nothing is cached."""
    words_of(own.tokenizer).ids.clear()  # what an earlier repeat has seen
    with tempfile.TemporaryDirectory() as cache_dir:
        return seconds(lambda: dataset(cache_dir)[0])


def dataset(cache_dir: str) -> utils.SupervisedDataset:
    args = own.args
    data_args = DataArguments(data_path=own.path, source=args.source, target=args.target, data_cache_dir=cache_dir)
    rows = utils.tokenize_file(own.path, own.tokenizer, data_args, args.model_max_length)
    return utils.SupervisedDataset([Part.of(DataFile(own.path), rows)])


def one_start(cache_dir: str) -> dict[str, float]:
    """Seconds until the first example, and memory above the bare imports: this process's, and with its workers'."""
    rank = psutil.Process()
    peak_rss, peak_pss, ended = 0, 0, threading.Event()

    def watch() -> None:
        nonlocal peak_rss, peak_pss
        while not ended.wait(0.2):
            pss = 0
            for process in (rank, *rank.children()):
                try:
                    memory = process.memory_full_info()
                except psutil.Error:  # the worker ended meanwhile
                    continue
                pss += memory.pss
                if process is rank:
                    peak_rss = max(peak_rss, memory.rss)
            peak_pss = max(peak_pss, pss)

    watcher = threading.Thread(target=watch)
    watcher.start()
    duration = seconds(lambda: dataset(cache_dir)[0])
    ended.set()
    watcher.join()
    return {
        "seconds": duration,
        "tokens": dataset(cache_dir).counts["tokens"],
        "peak_rss_gib": max(0, peak_rss - own.memory_of_imports.rss) / GIB,
        "peak_pss_gib": max(0, peak_pss - own.memory_of_imports.pss) / GIB,
    }


# ------------------------------------------------------------------------------------------------------ the measurement


def process_of_its_own(args: argparse.Namespace, path: str) -> ProcessPoolExecutor:
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), begin, (args, path))


def pairs_of(args: argparse.Namespace, path: str) -> list[tuple[str, str]]:
    return [cells for _, cells in read_rows(path, {args.source: "--source", args.target: "--target"})]


def write_rows(path: Path, rows, count: int, args: argparse.Namespace) -> str:
    path = path.with_suffix(args.format)
    if args.format == ".parquet":
        columns = dict(zip((args.source, args.target), map(list, zip(*islice(rows, count)))))
        parquet.write_table(pyarrow.table(columns), path)
        return str(path)
    if args.format == ".jsonl":
        with open(path, "w", encoding="utf-8") as file:
            for source, target in islice(rows, count):
                json.dump({args.source: source, args.target: target}, file, ensure_ascii=False)
                file.write("\n")
        return str(path)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow([args.source, args.target])
        writer.writerows(islice(rows, count))
    return str(path)


def again_and_again(rows: list[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """The rows, then copies of them in which each word that stands once in the rows is a word that stood nowhere.

    Tokenizing remembers words. New rows bring new ones, fewer and fewer; a copy brings as many as the first rows did.
    """
    yield from rows
    times = Counter(word for row in rows for cell in row for word in cell.split(" "))
    for copied in count(1):
        for row in rows:
            source, target = (
                " ".join(f"{word}{copied}" if times[word] == 1 else word for word in cell.split(" ")) for cell in row
            )
            yield source, target


def measure(args: argparse.Namespace) -> dict[str, float]:
    rows = pairs_of(args, args.data_path)
    asked = args.rows or len(rows)
    compared = min(asked, len(rows), ROWS_COMPARED)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as processes:
        path = write_rows(Path(folder, "compared.csv"), rows, compared, args)
        methods = {
            method: processes.enter_context(process_of_its_own(args, path)) for method in (ancestor, bare_call, ours)
        }
        durations: dict[Callable, list[float]] = {method: [] for method in methods}
        for _ in range(args.repeats):
            for method, process in methods.items():
                durations[method].append(process.submit(method).result())
        rates = {method: compared / statistics.median(durations[method]) for method in methods}

        path = write_rows(Path(folder, "rows.csv"), again_and_again(rows), asked, args)
        starts = []
        for _ in ("nothing cached", "cached"):
            with process_of_its_own(args, path) as process:
                starts.append(process.submit(one_start, folder).result())
        first, second = starts
        rate = asked / first["seconds"] if asked > compared else rates[ours]
        return {
            "rows": asked,
            "tokens": first["tokens"],
            "file_gib": os.path.getsize(path) / GIB,
            "rows_per_s": rate,
            "tokens_per_s": first["tokens"] * rate / asked,
            "ancestor_rows_per_s": rates[ancestor],
            "speedup": rate / rates[ancestor],
            "ceiling_rows_per_s": rates[bare_call],
            "fraction_of_ceiling": rate / rates[bare_call],
            "first_start_s": first["seconds"],
            "second_start_s": second["seconds"],
            "peak_rss_gib": max(start["peak_rss_gib"] for start in starts),
            "peak_pss_with_workers_gib": max(start["peak_pss_gib"] for start in starts),
            "cores": os.cpu_count() or 1,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", required=True, help="CSV file of real rows")
    parser.add_argument("--tokenizer", required=True, help="folder or hub repository of a LLaMA tokenizer")
    parser.add_argument("--rows", type=int, help="default: the file's; more repeat them")
    parser.add_argument("--format", default=".csv", choices=[".csv", ".jsonl", ".parquet"], help="of the file measured")
    parser.add_argument("--source", default="prompt")
    parser.add_argument("--target", default="response")
    parser.add_argument("--model_max_length", type=int, default=1024)
    parser.add_argument("--repeats", type=int, default=7)
    result = measure(parser.parse_args())
    print(json.dumps({name: round(value, 3) if isinstance(value, float) else value for name, value in result.items()}))


if __name__ == "__main__":
    main()

"""Write open_instruct_v1.csv, the dataset that the original names, or make such a CSV from a file of one's own.

    python examples/open_instruct.py                            from the Hugging Face hub
    python examples/open_instruct.py train.parquet              a copy on this disk: parquet, JSON or JSON lines
    python examples/open_instruct.py alpaca_data.json --output alpaca.csv

The CSV has two columns, `prompt` and `response`. Rows that hold a whole prompt already (`prompt` or `alpaca_prompt`) are
taken as they are; of others, `instruction` and, where there is one, `input` are put into Alpaca's prompt. The response is
`response` or `output`. Parquet files need pyarrow: pip install pyarrow
"""

import argparse
import csv
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sft.data.template import ALPACA_TEMPLATE

REPOSITORY = "VMware/open-instruct-v1-oasst-dolly-hhrlhf"
PROMPTS, RESPONSES = ("prompt", "alpaca_prompt"), ("response", "output")
FORMATS = (".parquet", ".json", ".jsonl")

ALPACA_INPUT_TEMPLATE = (  # stanford_alpaca, train.py, PROMPT_DICT["prompt_input"]
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)


def find_files(source: str) -> list[str]:
    """The files of a dataset: the one on this disk, or all data files of a hub repository, downloaded."""
    if Path(source).is_file():
        return [source]
    if source.endswith(FORMATS):
        sys.exit(f"error: {source}: no such file.")
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        names = [n for n in HfApi().list_repo_files(source, repo_type="dataset") if n.endswith(FORMATS)]
        files = [hf_hub_download(source, name, repo_type="dataset") for name in sorted(names)]
    except (OSError, HfHubHTTPError) as error:
        sys.exit(
            f"error: {source}: the hub does not give it ({type(error).__name__}). On a machine without a network, copy the "
            "dataset's files here and name one."
        )
    if not files:
        sys.exit(f"error: {source}: no file ending in {', '.join(FORMATS)} there.")
    return files


def read_records(path: str) -> Iterator[dict[str, Any]]:
    """Each row of a parquet file, a JSON list or JSON lines, by its column names."""
    if path.endswith(".parquet"):
        try:
            from pyarrow import parquet
        except ImportError:
            sys.exit(f"error: {path}: a parquet file needs pyarrow: pip install pyarrow")
        for batch in parquet.ParquetFile(path).iter_batches():
            yield from batch.to_pylist()
        return
    with open(path, encoding="utf-8-sig") as file:
        is_list = file.read(1) == "["
        file.seek(0)
        try:
            yield from json.load(file) if is_list else (json.loads(line) for line in file if line.strip())
        except ValueError as error:
            sys.exit(f"error: {path}: not JSON: {error}.")


def to_row(record: dict[str, Any], where: str) -> tuple[str, str]:
    """(prompt, response) of one record; a cell that holds nothing is empty, and training drops its row."""
    cells = {name: "" if value is None else str(value) for name, value in record.items()}
    response = next((cells[name] for name in RESPONSES if name in cells), None)
    prompt = next((cells[name] for name in PROMPTS if name in cells), None)
    if prompt is None and "instruction" in cells:
        template = ALPACA_INPUT_TEMPLATE if cells.get("input", "").strip() else ALPACA_TEMPLATE
        prompt = template.format(**cells) if cells["instruction"].strip() else ""
    if prompt is None or response is None:
        sys.exit(
            f"error: {where}: its columns are {', '.join(cells)}. Needed are one of {', '.join((*PROMPTS, 'instruction'))} and one of "
            f"{', '.join(RESPONSES)}."
        )
    return prompt, response


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", default=REPOSITORY, help=f"file, or dataset of the hub ({REPOSITORY})")
    parser.add_argument("--output", default="open_instruct_v1.csv", help="default: open_instruct_v1.csv")
    args = parser.parse_args()
    files = find_files(args.source)
    unfinished = Path(f"{args.output}.unfinished")
    count = 0
    try:
        with open(unfinished, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["prompt", "response"])
            for path in files:
                for number, record in enumerate(read_records(path), 1):
                    writer.writerow(to_row(record, f"{path}, row {number}"))
                    count += 1
        os.replace(unfinished, args.output)
    finally:
        unfinished.unlink(missing_ok=True)
    print(f"{args.output}: {count:,} rows of {args.source}")


if __name__ == "__main__":
    main()

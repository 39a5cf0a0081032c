"""Write open_instruct_v1.csv, the dataset that the original names, from the Hugging Face hub.

    python examples/open_instruct.py

Its two columns are `prompt` (Alpaca's prompt with the instruction in it) and `response`. A copy on this disk needs no
conversion, nor does Alpaca's own file: training reads parquet, JSON and JSON lines.

    --data_path train.parquet --source alpaca_prompt
    --data_path alpaca_data.json --source instruction --target output --prompt_template alpaca
"""

import argparse
import csv
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sft.data.files import KINDS, read_rows
from sft.job import UserError, one_message_for_user_errors

REPOSITORY = "VMware/open-instruct-v1-oasst-dolly-hhrlhf"


def download() -> list[str]:
    """The data files of the hub's repository."""
    from huggingface_hub import HfApi, hf_hub_download

    try:
        # asked once; `list_repo_files` tries again for half a minute where there is no network (huggingface-hub 1.x)
        there = [file.rfilename for file in HfApi().dataset_info(REPOSITORY, timeout=10).siblings or ()]
        names = sorted(name for name in there if name.endswith(tuple(KINDS)))
        files = [hf_hub_download(REPOSITORY, name, repo_type="dataset") for name in names]
    except Exception as error:  # of whichever HTTP library the hub's client uses
        raise UserError(
            f"{REPOSITORY}: the hub does not give it ({type(error).__name__}). On a machine without a network, copy the "
            "dataset's files here and train on them as they are: --data_path train.parquet --source alpaca_prompt"
        ) from error
    if not files:
        raise UserError(f"{REPOSITORY}: no file ending in {', '.join(KINDS)} there.")
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="open_instruct_v1.csv", help="default: open_instruct_v1.csv")
    output = parser.parse_args().output
    unfinished, count = Path(f"{output}.unfinished"), 0
    try:
        with open(unfinished, "w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["prompt", "response"])
            for path in download():
                for _, cells in read_rows(path, {"alpaca_prompt": "the code", "response": "the code"}):
                    writer.writerow(cells)
                    count += 1
        os.replace(unfinished, output)
    finally:
        unfinished.unlink(missing_ok=True)
    print(f"{output}: {count:,} rows of {REPOSITORY}")


if __name__ == "__main__":
    with one_message_for_user_errors():
        main()

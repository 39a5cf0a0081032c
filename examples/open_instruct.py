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
from sft.job import one_message_for_user_errors

REPOSITORY = "VMware/open-instruct-v1-oasst-dolly-hhrlhf"


def download() -> list[str]:
    """The data files of the hub's repository."""
    from huggingface_hub import HfApi, hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        names = [n for n in HfApi().list_repo_files(REPOSITORY, repo_type="dataset") if n.endswith(tuple(KINDS))]
        files = [hf_hub_download(REPOSITORY, name, repo_type="dataset") for name in sorted(names)]
    except (OSError, HfHubHTTPError) as error:
        sys.exit(
            f"error: {REPOSITORY}: the hub does not give it ({type(error).__name__}). On a machine without a network, copy the "
            "dataset's files here and train on them as they are: --data_path train.parquet --source alpaca_prompt"
        )
    return files or sys.exit(f"error: {REPOSITORY}: no file ending in {', '.join(KINDS)} there.")


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

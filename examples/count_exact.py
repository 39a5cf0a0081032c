"""Count the rows of a CSV whose `answer` equals their `response`, and fail when they are too few.

python examples/count_exact.py answers.csv --at_least 0.95
"""

import argparse
import csv
import sys


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("data_path", help="what `python -m sft.generate --output_path` wrote")
    parser.add_argument("--at_least", type=float, default=0.0, help="exit with 1 below this share")
    args = parser.parse_args()
    with open(args.data_path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    wrong = [row for row in rows if row["answer"] != row["response"]]
    for row in wrong[:3]:
        print(f"wrong: {row['prompt']!r} -> {row['answer']!r}, the file says {row['response']!r}")
    exact = len(rows) - len(wrong)
    if len(wrong) > 3:
        print(f"and {len(wrong) - 3} more")
    print(f"{exact} of {len(rows)} questions answered exactly ({exact / len(rows):.1%})")
    if exact < args.at_least * len(rows):
        sys.exit(f"error: below {args.at_least:.0%}")


if __name__ == "__main__":
    main()

"""Count the rows of a CSV whose `answer` equals their `response`, and fail when they are too few.

python examples/count_exact.py answers.csv --at_least 0.95
"""

import argparse
import sys

import pandas


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("data_path", help="what `python -m sft.generate --output_path` wrote")
    parser.add_argument("--at_least", type=float, default=0.0, help="exit with 1 below this share")
    args = parser.parse_args()
    table = pandas.read_csv(args.data_path, dtype=str, keep_default_na=False)
    exact = table["answer"] == table["response"]
    for _, row in table[~exact].head(3).iterrows():
        print(f"wrong: {row['prompt']!r} -> {row['answer']!r}, the file says {row['response']!r}")
    print(f"{exact.sum()} of {len(table)} questions answered exactly ({exact.mean():.1%})")
    if exact.mean() < args.at_least:
        sys.exit(f"error: below {args.at_least:.0%}")


if __name__ == "__main__":
    main()

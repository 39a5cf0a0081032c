"""Count the rows of a CSV whose `answer` equals their `response`, and fail when they are too few.

python examples/count_exact.py answers.csv --at_least 0.95
"""

import argparse
import csv
import sys


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("data_path", help="what `python -m sft.generate --output_path` wrote")
    parser.add_argument("--source", default="prompt", help="column of the questions (default: prompt)")
    parser.add_argument("--target", default="response", help="column of the right answers (default: response)")
    parser.add_argument("--answer_column", default="answer", help="column of the model's (default: answer)")
    parser.add_argument("--at_least", type=float, default=0.0, help="exit with 1 below this share")
    args = parser.parse_args()
    with open(args.data_path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    columns = args.source, args.answer_column, args.target
    if missing := [name for name in columns if rows and name not in rows[0]]:
        sys.exit(f"error: {args.data_path}: no column {missing[0]!r}. Its columns are {', '.join(rows[0])}.")
    wrong = [row for row in rows if row[args.answer_column] != row[args.target]]
    for question, answer, right in ([row[name] for name in columns] for row in wrong[:3]):
        print(f"wrong: {question!r} -> {answer!r}, the file says {right!r}")
    exact = len(rows) - len(wrong)
    if len(wrong) > 3:
        print(f"and {len(wrong) - 3} more")
    print(f"{exact} of {len(rows)} questions answered exactly ({exact / len(rows):.1%})")
    if exact < args.at_least * len(rows):
        sys.exit(f"error: below {args.at_least:.0%}")


if __name__ == "__main__":
    main()

"""Compare recorded runs, or print what the fields of run_report.json mean.

python -m sft.report RUN_A RUN_B --output compare.png
python -m sft.report --fields
"""

import argparse
import re
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sft.job import UserError, one_message_for_user_errors, say
from sft.outside import counted, read_object, reading
from sft.report.picture import draw, number
from sft.report.record import REPORT_NAME

FIELDS_PAGE = Path(__file__).resolve().parents[2] / "docs" / "run_report.md"


def load_runs(folders: list[str]) -> dict[str, dict]:
    """Read the reports of runs: name -> record. Raises a UserError that names every folder without one to draw."""
    runs, problems = {}, []
    names = [Path(folder).resolve().name for folder in folders]
    for folder, name in zip(folders, names):
        path = Path(folder) / REPORT_NAME
        try:
            record = read_object(path)
        except OSError:
            problems.append(f"{folder}: there is no {REPORT_NAME} in it. Give the --output_dir of a run that trained.")
        except ValueError as error:
            problems.append(f"{path}: not a report of a run ({error}).")
        else:
            if record.get("format") != 1:
                problems.append(f"{path}: not a report that this version reads (format 1).")
            elif not record.get("log"):
                status = record.get("status")
                problems.append(f"{path}: the run is {status} and logged no step: there is nothing to draw.")
            runs[name if names.count(name) == 1 else folder] = record
    if problems:
        raise UserError(problems)
    return runs


def comparison(runs: dict[str, dict]) -> str:
    """The runs as a Markdown table, and how far their losses lie apart at the steps that both logged."""
    rows: dict[str, Callable[[dict], Any]] = {
        "status": lambda r: r["status"],
        "steps logged to": lambda r: r["log"][-1]["step"],
        "last train loss": lambda r: f"{number(r['log'][-1]['loss']):.4f}",
        "last eval loss": lambda r: f"{number(r['evaluations'][-1]['eval_loss']):.4f}" if r["evaluations"] else "",
        "examples per step": lambda r: r.get("batch", {}).get("examples_per_step", ""),
        "tokens/s per GPU (median)": lambda r: f"{_median(r, 'tokens_per_s_per_gpu'):,.0f}",
        "padding (median)": lambda r: f"{_median(r, 'padding_share'):.1%}",
        "MFU (median)": lambda r: f"{_median(r, 'mfu'):.1%}" if "mfu" in r["log"][-1] else "peak unknown",
        "peak memory, GiB": lambda r: f"{r['log'][-1]['peak_memory_gib']:.2f}",
    }
    lines = ["| | " + " | ".join(runs) + " |", "|---|" + "---:|" * len(runs)]
    lines += [f"| {name} | " + " | ".join(str(read(r)) for r in runs.values()) + " |" for name, read in rows.items()]
    (first, a), *others = (
        (name, {entry["step"]: number(entry["loss"]) for entry in record["log"]}) for name, record in runs.items()
    )
    for other, b in others:
        if apart := {step: abs(a[step] - b[step]) for step in a if step in b}:
            worst = max(apart, key=lambda step: apart[step])
            differ = f"losses differ by at most {apart[worst]:.2e} (step {worst})"
            lines.append(f"\n{first} and {other}: {counted(len(apart), 'step')} in both logs, {differ}")
    return "\n".join(lines)


def _median(record: dict, name: str) -> float:
    return statistics.median_high(entry[name] for entry in record["log"])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m sft.report", description="Draw training runs on one figure.")
    parser.add_argument("runs", nargs="*", metavar="RUN", help="the --output_dir of a run")
    parser.add_argument("--output", default="compare.png", help="picture to write (default: compare.png)")
    parser.add_argument("--fields", action="store_true", help=f"print what each field of {REPORT_NAME} means")
    arguments = parser.parse_args(argv)
    with one_message_for_user_errors():
        if arguments.fields:
            say("\n".join(re.findall(r"^\|.*", FIELDS_PAGE.read_text(encoding="utf-8"), re.M)))
            return
        if not arguments.runs:
            raise UserError("no run is given: python -m sft.report RUN_A RUN_B")
        runs = load_runs(arguments.runs)
        with reading(f"a {REPORT_NAME} of these runs"):
            table = comparison(runs)
            draw(runs, Path(arguments.output))
        say(f"{table}\npicture: {arguments.output}")


if __name__ == "__main__":
    main()

"""Rewrite what comes from the code: the map in docs/code.md, and docs/flags.md. `make readme`; tests/docs/test_readme.py compares."""

import ast
import sys
from pathlib import Path

import transformers

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from sft import flags, trainer_flags  # noqa: E402

OTHER_FILES = {  # what is not Python and so has no docstring
    "ds_config.json": "DeepSpeed: ZeRO stage 2, optimizer on the CPU; edit the 2 to a 3 for stage 3.",
    "requirements.txt": "What the two scripts need.",
    "requirements-optional.txt": "One line for each feature that a run can switch on.",
    "requirements-dev.txt": "Tests and lint.",
    "examples/demo.sh": "What `make demo` runs.",
    "examples/facts.csv": "587 rows of facts, the demo's data; examples/make_facts.py wrote them.",
    "examples/slurm.sh": "Several machines under Slurm.",
    "benchmarks/LOG.md": "What was tried, predicted and measured, failures included.",
    "benchmarks/results/": "What the tables of docs/results.md were made from.",
    "benchmarks/run_multi_gpu.sh": "All that needs several GPUs, stage by stage.",
    "tests/": "A folder for each floor of sft/; CPU, offline.",
    "Makefile": "`make help` lists its targets.",
    "pyproject.toml": "Settings of pytest, ruff and mypy.",
}
ORDER = ("llama_training.py", "xgen_training.py", "utils.py", "sft", "ds_config.json", "requirements", "examples")


def render(page: str) -> str:
    """docs/code.md with its map as the code is now, between <!-- begin map --> and <!-- end map -->."""
    begin, end = "<!-- begin map -->\n", "<!-- end map -->"
    before, rest = page.split(begin)
    return f"{before}{begin}```text\n{code_map()}\n```\n{end}{rest.split(end, 1)[1]}"


def flags_page() -> str:
    """docs/flags.md, for the version of transformers that is installed."""
    version = ".".join(transformers.__version__.split(".")[:2])
    return f"""# What flags are there, and what becomes of the Trainer's own?

`make readme` writes this page from the code. `--help` has the same texts.

Two values for one thing are told, or refused. A flag that is given twice counts the last time. One that another flag leaves nothing to decide is named
(`--save_steps changes nothing: --save_strategy epoch decides`). What `accelerate launch` sets in the environment is taken as the flag, or refused when it and
the flag differ; a DeepSpeed file's `"auto"` is the flag's value, another number than the flag's is refused. A resumed run that differs from its
checkpoint's is refused unless `--resume_with_changes True` is given; how often it logs, evaluates and saves may differ.

## Of this project

{flags.flags_table()}

## Of the Trainer

Every field of `transformers.TrainingArguments` (transformers {version}), and what becomes of it here. A refused flag ends the run in
one sentence when it has another value than its default.

{trainer_flags.trainer_table()}
"""


def code_map() -> str:
    """Every file a reader may open, and the first sentence of its docstring."""
    python = [
        path
        for folder in ("", "sft/", "sft/*/", "examples/", "benchmarks/")
        for path in sorted(ROOT.glob(f"{folder}*.py"))
    ]
    described = {str(path.relative_to(ROOT)): first_line(path) for path in python if path.name != "__init__.py"}
    described |= {name: text for name, text in OTHER_FILES.items() if (ROOT / name).exists()}
    names = sorted(described, key=lambda name: (rank(name), name))
    width = max(map(len, names))
    return "\n".join(f"{name:<{width}}  {described[name]}" for name in names)


def rank(name: str) -> int:
    return next((index for index, start in enumerate(ORDER) if name.startswith(start)), len(ORDER) + ("/" not in name))


def first_line(path: Path) -> str:
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").split("\n")[0]


if __name__ == "__main__":
    path = ROOT / "docs" / "code.md"
    path.write_text(render(path.read_text(encoding="utf-8")), encoding="utf-8")
    (ROOT / "docs" / "flags.md").write_text(flags_page(), encoding="utf-8")

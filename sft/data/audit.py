"""What the rows are, said before a run trains on them: a few lines in every run, everything with --check_data True.

The audit costs less than tokenizing: it reads the CSV once more and counts in the tokenized rows; only a few dozen
characters around the end of each prompt are encoded again.
"""

import json
import math
import re
import sys
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from sft.job import UserError, printable, world_size

PERCENTILES = (1, 5, 25, 50, 75, 95, 99, 100)


ROWS_SHOWN = 10


SAMPLE = 1000  # rows from which the prompts' common ending is learned


WINDOW = 32  # characters on each side of the end of a prompt that are encoded jointly


def describe_rows(path: str, counts: dict[str, int]) -> str:
    """What became of a CSV's rows, in one line."""
    return (
        f"{path}: {counts['rows_read']:,} rows read; {counts['rows_empty']:,} dropped as empty, "
        f"{counts['rows_no_room']:,} dropped because the prompt leaves no room, {counts['kept']:,} kept, "
        f"of which {counts['rows_cut']:,} are cut and lost their EOS"
    )


def describe_datasets(train_dataset: Any, eval_dataset: Any | None) -> str:
    """How many examples and tokens there are, in one line for each dataset."""
    lines = []
    for name, dataset in (("training", train_dataset), ("evaluation", eval_dataset)):
        if dataset is not None:
            counts, lengths = dataset.counts, dataset.lengths
            median, high = np.percentile(lengths, (50, 99))
            lines.append(
                f"{name}: {counts['kept']:,} examples, {counts['tokens']:,} tokens, {counts['trained_tokens']:,} of them "
                f"trained ({counts['trained_tokens'] / counts['tokens']:.0%}); tokens per example: mean {lengths.mean():.0f}, "
                f"median {median:.0f}, 99 % {high:.0f}, longest {lengths.max()}"
            )
    return "\n".join(lines)


def describe_example(tokenizer: Any, dataset: Any, index: int, colour: bool) -> str:
    """One example as the model sees it, its trained tokens green on a terminal and in [...] elsewhere."""
    ids = dataset[index]["input_ids"].tolist()
    whole = tokenizer.decode(ids)
    trained_from = len(tokenizer.decode(ids[: dataset.prompt_lengths[index]]))
    before, after = ("\033[32m", "\033[0m") if colour else ("[", "]")
    text = f"{printable(whole[:trained_from])}{before}{printable(whole[trained_from:])}{after}"
    return f"row {dataset.row_numbers[index]}, its trained tokens {'in green' if colour else 'in [...]'}:\n{text}"


@dataclass
class Finding:
    """Something to know about the data, and the rows where it is."""

    what: str
    rows: list[int] = field(default_factory=list)  # the header is row 1
    useless: bool = False  # a run on these data is not worth its time

    def __str__(self) -> str:
        if not self.rows:
            return self.what
        shown = ", ".join(map(str, self.rows[:ROWS_SHOWN])) + (", …" if len(self.rows) > ROWS_SHOWN else "")
        return f"{self.what}: {len(self.rows):,} (row{'s' if len(self.rows) > 1 else ''} {shown})"


def audit(
    dataset: Any,
    cells: Iterable[tuple[int, str, str]],
    template: str,
    tokenizer: Any,
    encode_continuation: Callable[[list[str]], Sequence[Sequence[int]]],
    data_path: str,
    training_args: Any,
    vocabulary_size: int | None,
    evaluation: Any | None = None,
) -> int:
    """Print what is to be known about the training data, and write it to --output_dir; 1 when a run would be useless.

    Args:
        dataset: a SupervisedDataset over all kept rows.
        cells: (row number, source cell, target cell) of every row of the CSV, in order.
        encode_continuation: the ids of texts in the middle of a sequence.
        vocabulary_size: rows of the model's embedding.
        evaluation: a SupervisedDataset over the rows of a file of their own, if there is one.
    """
    findings = token_findings(dataset.rows, tokenizer, vocabulary_size)
    findings += leaks(dataset.rows, evaluation.rows) if evaluation else []
    planned: dict[str, Any] = {}
    examples: list[str] = []
    if len(dataset):
        control_texts = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
        findings += text_findings(cells, dataset.rows, template, control_texts, encode_continuation)
        planned, never_reached = plan(dataset.lengths, training_args)
        findings += never_reached
        five = np.linspace(0, len(dataset) - 1, num=min(5, len(dataset)), dtype=int)
        examples = [describe_example(tokenizer, dataset, i, colour=sys.stdout.isatty()) for i in five]
    text, content = report(data_path, dataset, planned, findings, examples)
    folder = Path(training_args.output_dir)
    write_report(folder, content, dataset, training_args.model_max_length)
    print(f"{text}\nevery row of every finding: {folder / 'data_report.json'}; lengths: {folder / 'data_lengths.png'}")
    return int(content["useless"])


def text_findings(
    cells: Iterable[tuple[int, str, str]],
    tokenized: Any,
    template: str,
    control_texts: Sequence[str],
    encode_continuation: Callable[[list[str]], Sequence[Sequence[int]]],
) -> list[Finding]:
    """What the cells of the kept rows show, in one pass over the CSV."""
    control = re.compile("|".join(map(re.escape, sorted(control_texts, key=len, reverse=True))) or r"(?!)")
    kept = np.zeros(len(tokenized.outcomes), bool)
    kept[tokenized.row_numbers - 2] = True
    kept_cells = (row for row in cells if kept[row[0] - 2])
    head = list(islice(kept_cells, SAMPLE))
    ending = _common_ending([source for _, source, _ in head]) if template == "{instruction}" else ""
    frame = [line.strip() for line in template.replace("{instruction}", "\n").split("\n") if len(line.strip()) > 7]
    rows, prompts, pairs = array("q"), array("q"), array("q")
    found: dict[str, list[int]] = {name: [] for name in ("control", "space", "twice", "bare", "merged")}
    boundaries: dict[tuple[str, str], list[int]] = {}  # end of a prompt and start of its response: rows

    def compare_boundaries() -> None:
        ends = list({end for end, _ in boundaries})
        alone = dict(zip(ends, encode_continuation(ends)))
        joints = encode_continuation([end + start for end, start in boundaries])
        for ((end, _), rows_of_it), joint in zip(boundaries.items(), joints):
            if list(joint[: len(alone[end])]) != list(alone[end]):
                found["merged"] += rows_of_it
        boundaries.clear()

    for row, source, target in chain(head, kept_cells):
        prompt = template.replace("{instruction}", source)
        rows.append(row)
        prompts.append(hash(source))
        pairs.append(hash((source, target)))
        if control.search(source) or control.search(target):
            found["control"].append(row)
        if prompt.endswith(" "):
            found["space"].append(row)
        if (ending and source.count(ending) > 1) or any(line in source for line in frame):
            found["twice"].append(row)
        if template == "{instruction}" and not (ending and source.endswith(ending)):
            found["bare"].append(row)
        boundaries.setdefault((_end_of(prompt), _start_of(target)), []).append(row)
        if len(boundaries) == 4096:
            compare_boundaries()
    compare_boundaries()

    numbers = np.array(rows)
    repeated_pair, repeated_prompt = _repeats(pairs), _repeats(prompts)
    bare = "prompts do not end as most do" if ending else "prompts look untemplated: they have no common ending"
    findings = [
        Finding("rows repeat an earlier one, prompt and response", numbers[repeated_pair].tolist()),
        Finding(
            "rows have an earlier row's prompt and another response", numbers[repeated_prompt & ~repeated_pair].tolist()
        ),
        Finding(
            f"rows spell a control token ({', '.join(control_texts[:4])}); it is encoded as text", found["control"]
        ),
        Finding(
            "prompts end in a space: most responses then tokenize differently from what generation sees", found["space"]
        ),
        Finding("prompts were put into the template before", found["twice"]),
        Finding(bare + "; --prompt_template alpaca wraps bare instructions", found["bare"]),
        Finding(
            "rows where prompt and response would share a token if they were tokenized together; here they do not, as in generation",
            sorted(found["merged"]),
        ),
    ]
    return [finding for finding in findings if finding.rows]


def leaks(train_rows: Any, eval_rows: Any) -> list[Finding]:
    """Evaluation rows whose prompt is also trained on; an --eval_split has none (sft/data/held_out.py)."""
    evaluated = np.fromiter(eval_rows.prompt_digests(), np.int64)
    trained = set(evaluated.tolist()).intersection(train_rows.prompt_digests())
    leaked = eval_rows.row_numbers[np.isin(evaluated, list(trained))]
    what = "rows of --eval_data_path have a prompt that is also trained on; they say little about new prompts"
    return [Finding(what, leaked.tolist())] if trained else []


def token_findings(rows: Any, tokenizer: Any, vocabulary_size: int | None) -> list[Finding]:
    """What the outcomes and the tokens show."""
    byte_ids = [i for token, i in tokenizer.get_vocab().items() if re.fullmatch(r"<0x(?!0[9AD])[0-9A-F]{2}>", token)]
    # GPT-2's family names its EOS as unk too: there every byte is in the vocabulary and nothing is unknown.
    unk_ids = [] if tokenizer.unk_token_id in (None, tokenizer.eos_token_id) else [tokenizer.unk_token_id]
    (with_bytes, _), (with_unk, unk_tokens) = _rows_with_ids(rows, byte_ids), _rows_with_ids(rows, unk_ids)
    counts = rows.counts()
    findings = [
        Finding("rows dropped: an empty prompt or response", rows.rows_with("empty").tolist()),
        Finding("rows dropped: the prompt leaves no room in --model_max_length", rows.rows_with("no_room").tolist()),
        Finding("rows cut at --model_max_length; they lose their EOS", rows.rows_with("cut").tolist()),
        Finding("rows with characters that are not in the vocabulary and became single bytes", with_bytes),
        Finding("rows with characters that the tokenizer does not know and replaced by unk", with_unk),
    ]
    findings = [finding for finding in findings if finding.rows]
    if not counts["kept"]:
        findings.append(Finding("no row is left to train on", useless=True))
    elif counts["rows_cut"] == counts["kept"]:
        findings.append(
            Finding("every row is cut, so no EOS is trained and the model never learns to stop", useless=True)
        )
    if unk_tokens * 2 > counts["tokens"]:
        findings.append(Finding("most tokens are unk: this is not a tokenizer for these texts", useless=True))
    if vocabulary_size is not None and counts["largest_id"] >= vocabulary_size:
        findings.append(
            Finding(
                f"token id {counts['largest_id']} is outside the model's embedding of {vocabulary_size}", useless=True
            )
        )
    return findings


def plan(lengths: np.ndarray, training_args: Any) -> tuple[dict[str, Any], list[Finding]]:
    """Steps, points that are never reached, and what padding would cost: one epoch, shuffled, cut into micro-batches."""
    size, accumulation = training_args.per_device_train_batch_size, training_args.gradient_accumulation_steps
    order = np.random.default_rng(training_args.seed).permutation(len(lengths))
    padded = lengths[order]
    padded = np.pad(padded, (0, -len(padded) % size)).reshape(-1, size)
    padded_tokens = int(padded.max(axis=1).astype(np.int64) @ np.count_nonzero(padded, axis=1))
    tokens = int(lengths.sum(dtype=np.int64))
    steps_per_epoch = math.ceil(math.ceil(len(lengths) / (size * world_size())) / accumulation)
    steps = (
        training_args.max_steps
        if training_args.max_steps > 0
        else math.ceil(steps_per_epoch * training_args.num_train_epochs)
    )
    findings = [
        Finding(f"--{name}_steps {every:g} is beyond the run's {steps} steps: that point is never reached")
        for name, strategy, every in (
            ("save", training_args.save_strategy, training_args.save_steps),
            ("eval", training_args.eval_strategy, training_args.eval_steps),
        )
        if strategy == "steps" and every and every > steps
    ]
    return {
        "examples_per_optimizer_step": size * accumulation * world_size(),
        "steps_per_epoch": steps_per_epoch,
        "steps": steps,
        "padded_tokens_per_epoch": padded_tokens,
        "padding_share": 1 - tokens / padded_tokens,
        "packing_speedup": padded_tokens / tokens,
    }, findings


def percentiles(lengths: np.ndarray) -> dict[str, int]:
    """Length in tokens at each of PERCENTILES."""
    return {str(p): int(value) for p, value in zip(PERCENTILES, np.percentile(lengths, PERCENTILES, method="higher"))}


def report(
    data_path: str, dataset: Any, planned: dict[str, Any], findings: list[Finding], examples: list[str]
) -> tuple[str, dict[str, Any]]:
    """The audit as text and as what data_report.json holds."""
    useless = [finding.what for finding in findings if finding.useless]
    verdict = f"useless: {'; '.join(useless)}" if useless else "ready to train"
    if findings and not useless:
        verdict += f"; {len(findings)} finding{'s' if len(findings) > 1 else ''} to look at first"
    lengths = {}
    text = [describe_rows(data_path, dataset.counts)]
    if len(dataset):
        lengths = {
            "prompt": percentiles(dataset.prompt_lengths),
            "response": percentiles(dataset.lengths - dataset.prompt_lengths),
            "total": percentiles(dataset.lengths),
        }
        text += ["", f"{'tokens':10}" + "".join(f"{f'{p} %':>8}" for p in PERCENTILES)]
        text += [f"{name:10}" + "".join(f"{value:8,}" for value in row.values()) for name, row in lengths.items()]
        text += [
            "",
            f"{planned['steps_per_epoch']:,} steps per epoch of {planned['examples_per_optimizer_step']} examples, "
            f"{planned['steps']:,} in the run",
            f"padded, {planned['padding_share']:.0%} of the tokens computed would be padding; packed, none are: "
            f"{planned['packing_speedup']:.2f} times fewer tokens",
        ]
    text += ["", *(f"- {finding}" for finding in findings)]
    text += [part for example in examples for part in ("", example)]
    text += ["", f"verdict: {verdict}"]
    return "\n".join(text), {
        "data_path": data_path,
        "verdict": verdict,
        "useless": bool(useless),
        "counts": dataset.counts,
        "percentiles": lengths,
        "plan": planned,
        "findings": [asdict(finding) for finding in findings],
    }


def write_report(folder: Path, content: dict[str, Any], dataset: Any, max_length: int) -> None:
    """Write data_report.json, and data_lengths.png when there is an example to draw."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(
            "--check_data draws the lengths with matplotlib, which is not installed: pip install matplotlib"
        ) from None
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "data_report.json").write_text(json.dumps(content, indent=1) + "\n")
    if not len(dataset):
        return
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    bins = np.linspace(0, max_length, 65)
    parts = {
        "total": dataset.lengths,
        "prompt": dataset.prompt_lengths,
        "response": dataset.lengths - dataset.prompt_lengths,
    }
    for name, lengths in parts.items():
        axes.hist(lengths, bins=bins, histtype="step", linewidth=1.5, label=f"{name}, mean {lengths.mean():.0f}")
    axes.axvline(max_length, color="grey", linestyle=":", label=f"--model_max_length {max_length}")
    axes.set(
        xlabel="tokens", ylabel="examples", title=f"{len(dataset):,} examples of {Path(content['data_path']).name}"
    )
    axes.legend()
    figure.savefig(folder / "data_lengths.png", dpi=120)


def _common_ending(sources: list[str]) -> str:
    """The last line that most of the prompts share; empty when there is none."""
    lines = Counter(source.rsplit("\n", 1)[-1][-WINDOW:] for source in sources)
    line, times = lines.most_common(1)[0] if lines else ("", 0)
    return line if line.strip() and times * 2 > len(sources) and times > 1 else ""


def _end_of(prompt: str) -> str:
    """The last characters of a prompt, from a space on, where a new token begins."""
    end = prompt[-WINDOW:]
    return end[max(0, end.find(" ")) :]


def _start_of(response: str) -> str:
    """The first characters of a response, up to a space."""
    start = response[:WINDOW]
    space = start.rfind(" ")
    return start[:space] if space > 0 and len(response) > WINDOW else start


def _repeats(keys: array) -> np.ndarray:
    """Whether each key stood earlier already."""
    repeated = np.ones(len(keys), bool)
    repeated[np.unique(np.frombuffer(keys, np.int64), return_index=True)[1]] = False
    return repeated


def _rows_with_ids(rows: Any, ids: list[int], block: int = 2**22) -> tuple[list[int], int]:
    """Numbers of the rows that hold one of these ids, and how often the ids occur in all."""
    found: set[int] = set()
    total = 0
    wanted = np.zeros(rows.largest_id + 1, bool)
    wanted[[i for i in ids if i <= rows.largest_id]] = True
    for start in range(0, len(rows.tokens) if wanted.any() else 0, block):
        places = start + np.flatnonzero(wanted[rows.tokens[start : start + block]])
        total += len(places)
        found.update(np.unique(np.searchsorted(rows.offsets, places, side="right") - 1).tolist())
    return rows.row_numbers[sorted(found)].tolist(), total

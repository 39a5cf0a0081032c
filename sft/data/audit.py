"""Describe the rows before a run trains on them: a few lines in every run, everything with --check_data True.

The audit costs less than tokenizing: it reads the CSV once more and counts in the tokenized rows.
"""

import gc
import json
import re
import sys
from array import array
from collections import Counter
from dataclasses import asdict, dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from sft.arithmetic import Arithmetic
from sft.data.csv_rows import read_csv
from sft.data.template import load_template
from sft.data.token_cache import CUT, KEPT, TokenizedRows
from sft.flags import DataArguments, TrainingArguments
from sft.job import printable, rank

PERCENTILES = (1, 5, 25, 50, 75, 95, 99, 100)
ROWS_SHOWN = 10
SAMPLE = 1000  # rows from which the prompts' common ending is learned
LONGEST_ENDING = 32  # characters


def describe_rows(path: str, counts: dict[str, int]) -> str:
    """What became of a CSV's rows, in one line."""
    return (
        f"{path}: {counts['rows_read']:,} rows read; {counts['rows_empty']:,} dropped as empty, "
        f"{counts['rows_no_room']:,} dropped because the prompt leaves no room, {counts['kept']:,} kept, "
        f"of which {counts['rows_cut']:,} are cut and lost their EOS"
    )


def describe_datasets(train_dataset: Any, eval_dataset: Any | None) -> str:
    """Examples and tokens, in one line for each dataset."""
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


def check_data(tokenizer, data_args: DataArguments, args: TrainingArguments, config, dataset, evaluation=None) -> int:
    """Audit the training data in place of training; the exit code, 1 when a run would be useless.

    Args:
        config: the model's.
        dataset, evaluation: a SupervisedDataset over all kept rows of --data_path, and of --eval_data_path if given.
    """
    if rank() != 0:
        return 0
    findings = token_findings(dataset.rows, tokenizer, config.vocab_size)
    findings += leaks(dataset.rows, evaluation.rows) if evaluation else []
    planned: dict[str, Any] = {}
    lengths: dict[str, np.ndarray] = {}
    examples: list[str] = []
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if len(dataset):
        prompts, totals = dataset.prompt_lengths, dataset.lengths
        lengths = {"prompt": prompts, "response": totals - prompts, "total": totals}
        findings += text_findings(dataset.rows, tokenizer, data_args)
        planned, never_reached = plan(totals, args)
        findings += never_reached
        five = np.linspace(0, len(dataset) - 1, num=min(5, len(dataset)), dtype=int)
        examples = [describe_example(tokenizer, dataset, i, colour=sys.stdout.isatty()) for i in five]
        draw_lengths(folder / "data_lengths.png", lengths, args.model_max_length, data_args.data_path)
    useless = [finding.what for finding in findings if finding.useless]
    verdict = f"useless: {'; '.join(useless)}" if useless else "ready to train"
    if findings and not useless:
        verdict += f"; {len(findings)} finding{'s' if len(findings) > 1 else ''} to look at first"
    report = {
        "data_path": data_args.data_path,
        "verdict": verdict,
        "useless": bool(useless),
        "counts": dataset.counts,
        "percentiles": {
            name: dict(zip(map(str, PERCENTILES), np.percentile(part, PERCENTILES, method="higher").tolist()))
            for name, part in lengths.items()
        },
        "plan": planned,
        "findings": [asdict(finding) for finding in findings],
    }
    (folder / "data_report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(describe_report(report, findings, examples))
    print(f"every row of every finding: {folder / 'data_report.json'}; lengths: {folder / 'data_lengths.png'}")
    return int(bool(useless))


def text_findings(rows: TokenizedRows, tokenizer: Any, data_args: DataArguments) -> list[Finding]:
    """What the cells of the kept rows show, in one pass over the CSV."""
    template = load_template(data_args.prompt_template)
    control_texts = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    control = re.compile("|".join(map(re.escape, sorted(control_texts, key=len, reverse=True))) or r"(?!)")
    kept = np.isin(rows.outcomes, (KEPT, CUT))
    cells = (row for row in read_csv(data_args.data_path, data_args.source, data_args.target) if kept[row[0] - 2])
    head = list(islice(cells, SAMPLE))
    ending = _common_ending([source for _, source, _ in head]) if template == "{instruction}" else ""
    frame = [line.strip() for line in template.replace("{instruction}", "\n").split("\n") if len(line.strip()) > 7]
    prompts, pairs = array("q"), array("q")
    spells_control, ends_in_space, templated_twice, untemplated = ([] for _ in range(4))  # row numbers
    gc.freeze()  # else all that was imported is searched for garbage while the texts come and go: 0.25 s
    for row, source, target in chain(head, cells):
        prompts.append(hash(source))
        pairs.append(hash((source, target)))
        if control.search(source) or control.search(target):
            spells_control.append(row)
        if template.replace("{instruction}", source).endswith(" "):
            ends_in_space.append(row)
        if (ending and source.count(ending) > 1) or any(line in source for line in frame):
            templated_twice.append(row)
        if template == "{instruction}" and not (ending and source.endswith(ending)):
            untemplated.append(row)
    gc.unfreeze()
    pair, prompt = _repeats(pairs), _repeats(prompts)
    bare = "prompts do not end as most do" if ending else "prompts look untemplated: they have no common ending"
    found = {
        "rows repeat an earlier one, prompt and response": rows.row_numbers[pair].tolist(),
        "rows have an earlier row's prompt and another response": rows.row_numbers[prompt & ~pair].tolist(),
        f"rows spell a control token ({', '.join(control_texts[:4])}); it is encoded as text": spells_control,
        "prompts end in a space: most responses then tokenize differently from what generation sees": ends_in_space,
        "prompts were put into the template before": templated_twice,
        f"{bare}; --prompt_template alpaca wraps bare instructions": untemplated,
    }
    return [Finding(what, numbers) for what, numbers in found.items() if numbers]


def leaks(train_rows: TokenizedRows, eval_rows: TokenizedRows) -> list[Finding]:
    """Evaluation rows whose prompt is also trained on; an --eval_split has none (sft/data/held_out.py)."""
    evaluated = np.fromiter(eval_rows.prompt_digests(), np.int64)
    trained = set(evaluated.tolist()).intersection(train_rows.prompt_digests())
    leaked = eval_rows.row_numbers[np.isin(evaluated, list(trained))]
    what = "rows of --eval_data_path have a prompt that is also trained on; they say little about new prompts"
    return [Finding(what, leaked.tolist())] if trained else []


def token_findings(rows: TokenizedRows, tokenizer: Any, vocabulary_size: int) -> list[Finding]:
    """What the outcomes and the tokens show."""
    byte_ids = [i for token, i in tokenizer.get_vocab().items() if re.fullmatch(r"<0x(?!0[9AD])[0-9A-F]{2}>", token)]
    # GPT-2's family names its EOS as unk too: there every byte is in the vocabulary and nothing is unknown.
    unk_ids = [] if tokenizer.unk_token_id in (None, tokenizer.eos_token_id) else [tokenizer.unk_token_id]
    (with_bytes, _), (with_unk, unk_tokens) = _rows_with_ids(rows, byte_ids), _rows_with_ids(rows, unk_ids)
    found = {
        "rows dropped: an empty prompt or response": rows.rows_with("empty").tolist(),
        "rows dropped: the prompt leaves no room in --model_max_length": rows.rows_with("no_room").tolist(),
        "rows cut at --model_max_length; they lose their EOS": rows.rows_with("cut").tolist(),
        "rows with characters that are not in the vocabulary and became single bytes": with_bytes,
        "rows with characters that the tokenizer does not know and replaced by unk": with_unk,
    }
    kept, cut = len(rows.lengths), len(rows.rows_with("cut"))
    useless = [
        (not kept, "no row is left to train on"),
        (0 < kept == cut, "every row is cut, so no EOS is trained and the model never learns to stop"),
        (unk_tokens * 2 > len(rows.tokens), "most tokens are unk: this is not a tokenizer for these texts"),
        (
            rows.largest_id >= vocabulary_size,
            f"token id {rows.largest_id} is outside the model's embedding of {vocabulary_size}",
        ),
    ]
    findings = [Finding(what, numbers) for what, numbers in found.items() if numbers]
    return findings + [Finding(what, useless=True) for is_so, what in useless if is_so]


def plan(lengths: np.ndarray, args: TrainingArguments) -> tuple[dict[str, Any], list[Finding]]:
    """Steps, what padding would cost (one epoch, shuffled, cut into micro-batches), and points that are never reached."""
    size, planned = args.per_device_train_batch_size, Arithmetic.of(args, len(lengths))
    padded = np.random.default_rng(args.seed).permutation(lengths)
    padded = np.pad(padded, (0, -len(padded) % size)).reshape(-1, size)
    padded_tokens = int(padded.max(axis=1).astype(np.int64) @ np.count_nonzero(padded, axis=1))
    tokens = int(lengths.sum(dtype=np.int64))
    points = (("save", args.save_strategy, args.save_steps), ("eval", args.eval_strategy, args.eval_steps))
    return {
        "examples_per_optimizer_step": planned.examples_per_step,
        "steps_per_epoch": planned.steps_per_epoch,
        "steps": planned.steps,
        "padded_tokens_per_epoch": padded_tokens,
        "padding_share": 1 - tokens / padded_tokens,
        "packing_speedup": padded_tokens / tokens,
    }, [
        Finding(f"--{name}_steps {every:g} is beyond the run's {planned.steps} steps: that point is never reached")
        for name, strategy, every in points
        if strategy == "steps" and every and every > planned.steps
    ]


def describe_report(report: dict[str, Any], findings: list[Finding], examples: list[str]) -> str:
    text = [describe_rows(report["data_path"], report["counts"])]
    if report["percentiles"]:
        text += ["", f"{'tokens':10}" + "".join(f"{f'{p} %':>8}" for p in PERCENTILES)]
        text += [f"{name:10}" + "".join(f"{n:8,}" for n in row.values()) for name, row in report["percentiles"].items()]
        text += [
            "\n{steps_per_epoch:,} steps per epoch of {examples_per_optimizer_step} examples, {steps:,} in the run\n"
            "padded, {padding_share:.0%} of the tokens computed would be padding; packed, none are: "
            "{packing_speedup:.2f} times fewer tokens".format(**report["plan"])
        ]
    text += ["", *(f"- {finding}" for finding in findings), *(f"\n{example}" for example in examples)]
    return "\n".join([*text, "", f"verdict: {report['verdict']}"])


def draw_lengths(path: Path, parts: dict[str, np.ndarray], max_length: int, data_path: str) -> None:
    """Draw how many examples have which length, in tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    title = f"{len(parts['total']):,} examples of {Path(data_path).name}"
    axes = figure.add_subplot(xlabel="tokens", ylabel="examples", title=title)
    labels = [f"{name}, mean {lengths.mean():.0f}" for name, lengths in parts.items()]
    axes.hist([*parts.values()], np.linspace(0, max_length, 65), histtype="step", linewidth=1.5, label=labels)
    axes.axvline(max_length, color="grey", linestyle=":", label=f"--model_max_length {max_length}")
    axes.legend()
    figure.savefig(path, dpi=120)


def _common_ending(sources: list[str]) -> str:
    """The last line that most of the prompts share; empty when there is none."""
    lines = Counter(source.rsplit("\n", 1)[-1][-LONGEST_ENDING:] for source in sources)
    line, times = lines.most_common(1)[0] if lines else ("", 0)
    return line if line.strip() and times * 2 > len(sources) and times > 1 else ""


def _repeats(keys: array) -> np.ndarray:
    """Whether each key stood earlier already."""
    repeated = np.ones(len(keys), bool)
    repeated[np.unique(np.frombuffer(keys, np.int64), return_index=True)[1]] = False
    return repeated


def _rows_with_ids(rows: TokenizedRows, ids: list[int], block: int = 2**22) -> tuple[list[int], int]:
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

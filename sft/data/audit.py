"""Describe the rows before a run trains on them: a few lines in every run, everything with --check_data True.

The audit costs less than tokenizing: it reads the CSV once more and counts in the tokenized rows.
"""

import json
import re
import sys
from collections import Counter
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sft.arithmetic import Arithmetic
from sft.data.checks import check_vocabulary, too_many_positions
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


class Finding(NamedTuple):
    """Something to know about the data, and the rows where it is."""

    what: str
    rows: list[int]  # the header is row 1
    useless: bool = False  # a run on these data is not worth its time

    def __str__(self) -> str:
        if not self.rows:
            return self.what
        shown = ", ".join(map(str, self.rows[:ROWS_SHOWN])) + (", …" if len(self.rows) > ROWS_SHOWN else "")
        return f"{self.what}: {len(self.rows):,} (row{'s' if len(self.rows) > 1 else ''} {shown})"


def check_data(tokenizer, data_args: DataArguments, args: TrainingArguments, config, dataset, evaluation=None) -> int:
    """Audit the training data in place of training; the exit code, 1 when a run would be useless.

    Each dataset is a SupervisedDataset over all kept rows: of --data_path, and of --eval_data_path if given.
    """
    if rank() != 0:
        return 0
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    findings = [Finding(problem, [], useless=True) for problem in check_vocabulary(tokenizer, config)]
    findings += token_findings(dataset.rows, tokenizer, config.vocab_size)
    findings += leaks(dataset.rows, evaluation.rows) if evaluation else []
    planned: dict[str, Any] = {}
    percentiles: dict[str, dict[str, int]] = {}
    text, examples = [describe_rows(data_args.data_path, dataset.counts), ""], []
    if len(dataset):
        prompts, totals = dataset.prompt_lengths, dataset.lengths
        lengths = {"prompt": prompts, "response": totals - prompts, "total": totals}
        title = f"{len(dataset):,} examples of {Path(data_args.data_path).name}"
        draw_lengths(folder / "data_lengths.png", title, lengths, args.model_max_length)
        planned, never_reached = plan(totals, args)
        positions, refused = too_many_positions(config, totals)
        if positions:
            rows = dataset.row_numbers[totals > config.max_position_embeddings]
            findings.append(Finding(positions, rows.tolist(), refused))
        findings += text_findings(dataset.rows, tokenizer, data_args) + never_reached
        text.append(f"{'tokens':10}" + "".join(f"{f'{p} %':>8}" for p in PERCENTILES))
        for name, part in lengths.items():
            values = np.percentile(part, PERCENTILES, method="higher").tolist()
            percentiles[name] = dict(zip(map(str, PERCENTILES), values))
            text.append(f"{name:10}" + "".join(f"{value:8,}" for value in values))
        text.append(
            "\n{steps_per_epoch:,} steps per epoch of {examples_per_optimizer_step} examples, {steps:,} in the run\n"
            "padded, {padding_share:.0%} of the tokens computed would be padding; packed, none are: "
            "{packing_speedup:.2f} times fewer tokens\n".format(**planned)
        )
        five = np.linspace(0, len(dataset) - 1, num=min(5, len(dataset)), dtype=int)
        examples = ["\n" + describe_example(tokenizer, dataset, i, colour=sys.stdout.isatty()) for i in five]
    useless = "; ".join(finding.what for finding in findings if finding.useless)
    verdict = f"useless: {useless}" if useless else "ready to train"
    if findings and not useless:
        verdict += f"; {len(findings)} finding{'s' if len(findings) > 1 else ''} to look at first"
    report = {"data_path": data_args.data_path, "verdict": verdict, "useless": bool(useless), "counts": dataset.counts}
    report |= {"percentiles": percentiles, "plan": planned, "findings": [finding._asdict() for finding in findings]}
    (folder / "data_report.json").write_text(json.dumps(report, indent=1) + "\n")
    print("\n".join([*text, *(f"- {finding}" for finding in findings), *examples, "", f"verdict: {verdict}"]))
    print(f"every row of every finding: {folder / 'data_report.json'}; lengths: {folder / 'data_lengths.png'}")
    return int(bool(useless))


def _found(row_numbers: dict[str, np.ndarray]) -> list[Finding]:
    return [Finding(what, rows.tolist()) for what, rows in row_numbers.items() if len(rows)]


def text_findings(rows: TokenizedRows, tokenizer: Any, data_args: DataArguments) -> list[Finding]:
    """What the cells of the kept rows show, in one pass over the CSV."""
    template = load_template(data_args.prompt_template)
    bare = template == "{instruction}"
    frame = [line.strip() for line in template.replace("{instruction}", "\n").split("\n") if len(line.strip()) > 7]
    control_texts = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    control = re.compile("|".join(map(re.escape, control_texts)) or r"(?!)")
    kept = np.isin(rows.outcomes, (KEPT, CUT))
    cells = (row for row in read_csv(data_args.data_path, data_args.source, data_args.target) if kept[row[0] - 2])
    head = list(islice(cells, SAMPLE))
    endings = Counter(source.rsplit("\n", 1)[-1][-LONGEST_ENDING:] for _, source, _ in head)
    ending, times = endings.most_common(1)[0]
    if not (bare and ending.strip() and times > max(1, len(head) / 2)):
        ending = ""  # most prompts share none
    facts = (
        (
            hash(source),
            hash((source, target)),
            control.search(source) or control.search(target),
            template.replace("{instruction}", source).endswith(" "),
            (ending and source.count(ending) > 1) or any(line in source for line in frame),
            bare and not (ending and source.endswith(ending)),
        )
        for _, source, target in chain(head, cells)
    )
    table = np.fromiter(facts, "i8, i8, ?, ?, ?, ?")
    prompts, pairs, control_tokens, spaces, templated, untemplated = (table[name] for name in table.dtype.names)
    places = np.arange(len(table))
    again, pair_again = (~np.isin(places, np.unique(keys, return_index=True)[1]) for keys in (prompts, pairs))
    common = "prompts do not end as most do" if ending else "prompts look untemplated: they have no common ending"
    masks = {
        "rows repeat an earlier one, prompt and response": pair_again,
        "rows have an earlier row's prompt and another response": again & ~pair_again,
        f"rows spell a control token ({', '.join(control_texts[:4])}); it is encoded as text": control_tokens,
        "prompts end in a space: most responses then tokenize differently from what generation sees": spaces,
        "prompts were put into the template before": templated,
        f"{common}; --prompt_template alpaca wraps bare instructions": untemplated,
    }
    return _found({what: rows.row_numbers[mask] for what, mask in masks.items()})


def leaks(train_rows: TokenizedRows, eval_rows: TokenizedRows) -> list[Finding]:
    """Evaluation rows whose prompt is also trained on; an --eval_split has none (`hold_out`)."""
    evaluated, trained = (np.fromiter(rows.prompt_digests(), np.int64) for rows in (eval_rows, train_rows))
    what = "rows of --eval_data_path have a prompt that is also trained on; they say little about new prompts"
    return _found({what: eval_rows.row_numbers[np.isin(evaluated, trained)]})


def token_findings(rows: TokenizedRows, tokenizer: Any, vocabulary_size: int) -> list[Finding]:
    """What the outcomes and the tokens show."""
    byte_ids = [i for token, i in tokenizer.get_vocab().items() if re.fullmatch(r"<0x(?!0[9AD])[0-9A-F]{2}>", token)]
    # GPT-2's family names its EOS as unk too: there every byte is in the vocabulary and nothing is unknown.
    unk_ids = [] if tokenizer.unk_token_id in (None, tokenizer.eos_token_id) else [tokenizer.unk_token_id]
    (with_bytes, _), (with_unk, unk_tokens) = _rows_with_ids(rows, byte_ids), _rows_with_ids(rows, unk_ids)
    cut = rows.rows_with("cut")
    found = {
        "rows dropped: an empty prompt or response": rows.rows_with("empty"),
        "rows dropped: the prompt leaves no room in --model_max_length": rows.rows_with("no_room"),
        "rows cut at --model_max_length; they lose their EOS": cut,
        "rows with characters that are not in the vocabulary and became single bytes": with_bytes,
        "rows with characters that the tokenizer does not know and replaced by unk": with_unk,
    }
    outside = f"token id {rows.largest_id} is outside the model's embedding of {vocabulary_size}"
    useless = {
        "no row is left to train on": not len(rows.lengths),
        "every row is cut, so no EOS is trained and the model never learns to stop": 0 < len(rows.lengths) == len(cut),
        "most tokens are unk: this is not a tokenizer for these texts": unk_tokens * 2 > len(rows.tokens),
        outside: rows.largest_id >= vocabulary_size,
    }
    return _found(found) + [Finding(what, [], useless=True) for what, is_so in useless.items() if is_so]


def plan(lengths: np.ndarray, args: TrainingArguments) -> tuple[dict[str, Any], list[Finding]]:
    """Steps, what padding would cost (one epoch, shuffled, cut into micro-batches), and points that are never reached."""
    size, planned = args.per_device_train_batch_size, Arithmetic.of(args, len(lengths))
    padded = np.random.default_rng(args.seed).permutation(lengths)
    padded = np.pad(padded, (0, -len(padded) % size)).reshape(-1, size)
    padded_tokens = int(padded.max(axis=1).astype(np.int64) @ np.count_nonzero(padded, axis=1))
    tokens = int(lengths.sum(dtype=np.int64))
    points = (("save", args.save_strategy, args.save_steps), ("eval", args.eval_strategy, args.eval_steps))
    never_reached = [
        Finding(f"--{name}_steps {every:g} is beyond the run's {planned.steps} steps: that point is never reached", [])
        for name, strategy, every in points
        if strategy == "steps" and every and every > planned.steps
    ]
    padding = {"padded_tokens_per_epoch": padded_tokens, "padding_share": 1 - tokens / padded_tokens}
    steps = {name: getattr(planned, name) for name in ("steps_per_epoch", "steps")}
    examples = {"examples_per_optimizer_step": planned.examples_per_step}
    return examples | steps | padding | {"packing_speedup": padded_tokens / tokens}, never_reached


def draw_lengths(path: Path, title: str, parts: dict[str, np.ndarray], max_length: int) -> None:
    """Draw how many examples have which length, in tokens."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel=f"tokens, --model_max_length {max_length}", ylabel="examples", title=title)
    labels = [f"{name}, mean {lengths.mean():.0f}" for name, lengths in parts.items()]
    axes.hist([*parts.values()], np.linspace(0, max_length, 65), histtype="step", linewidth=1.5, label=labels)
    axes.legend()
    figure.savefig(path, dpi=120)


def _rows_with_ids(rows: TokenizedRows, ids: list[int], block: int = 2**22) -> tuple[np.ndarray, int]:
    """Numbers of the rows that hold one of these ids, and how often the ids occur in all."""
    total, found = 0, [np.empty(0, np.int64)]
    for start in range(0, len(rows.tokens) if ids else 0, block):
        places = start + np.flatnonzero(np.isin(rows.tokens[start : start + block], ids))
        total += len(places)
        found.append(np.unique(np.searchsorted(rows.offsets, places, side="right") - 1))
    return rows.row_numbers[np.unique(np.concatenate(found))], total

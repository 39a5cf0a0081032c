"""Describe the rows before a run trains on them: a few lines in every run, everything with --check_data True.

The audit costs less than tokenizing: it reads the files once more and counts in the tokenized rows.
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sft import IGNORE_INDEX
from sft.arithmetic import Arithmetic
from sft.data.checks import check_vocabulary, too_many_positions
from sft.data.encode import control_tokens
from sft.data.files import read_rows
from sft.data.mixture import Part
from sft.data.segments import Rows
from sft.data.template import PLACE
from sft.data.token_cache import CUT, KEPT, SHORTENED, TokenizedRows
from sft.flags import DataArguments, TrainingArguments
from sft.job import rank, say
from sft.outside import counted, printable

PERCENTILES = (1, 5, 25, 50, 75, 95, 99, 100)
ROWS_SHOWN = 10
SAMPLE = 1000  # rows from which the prompts' common ending is learned
LONGEST_ENDING = 32  # characters


def describe_part(part: Part) -> str:
    """What became of a file's rows, in one line."""
    counts = part.rows.counts()
    lost = [f"{counts['rows_empty']:,} empty", f"{counts['rows_no_room']:,} whose prompt leaves no room"]
    if counts["rows_disagreed"]:
        rows = first_of(part.rows.rows_with("disagreed"))
        lost.append(
            f"{counts['rows_disagreed']:,} of which the template shows an earlier turn otherwise later, or the tokenizer reads it so (rows {rows})"
        )
    short = f"{counts['rows_cut']:,} cut, without EOS"
    if counts["rows_shortened"]:
        short += f", {counts['rows_shortened']:,} without their last turns"
    taken = ""
    if part.times < 1:
        taken = f"; {len(part.kept):,} of them are taken (*{part.times:g})"
    elif part.times > 1:
        taken = f"; each is taken {part.times:g} times"
    read = counted(counts["rows_read"], "row")
    return f"{part.path}: {read} read, {counts['kept']:,} kept ({short}); dropped: {', '.join(lost)}{taken}"


def first_of(rows: Any) -> str:
    """The first of these rows, for a message."""
    return ", ".join(map(str, rows[:ROWS_SHOWN])) + ", …" * (len(rows) > ROWS_SHOWN)


def describe_datasets(train_dataset: Any, eval_dataset: Any | None) -> str:
    """Examples and tokens, in one line for each dataset."""
    lines = []
    for name, dataset in (("training", train_dataset), ("evaluation", eval_dataset)):
        if dataset is not None:
            counts, lengths = dataset.counts, dataset.lengths
            median, high = np.percentile(lengths, (50, 99))
            answers = np.concatenate([part.answers() for part in dataset.parts])
            turns = f" with {answers.sum():,} answers (up to {answers.max()})" if answers.max() > 1 else ""
            lines.append(
                f"{name}: {counted(counts['kept'], 'example')}{turns}, {counts['tokens']:,} tokens, {counts['trained_tokens']:,} of them "
                f"trained ({counts['trained_tokens'] / counts['tokens']:.0%}); tokens per example: mean {lengths.mean():.0f}, "
                f"median {median:.0f}, 99 % {high:.0f}, longest {lengths.max()}"
            )
    return "\n".join(lines)


def describe_example(tokenizer: Any, dataset: Any, index: int, colour: bool) -> str:
    """One example as the model sees it, its trained tokens green on a terminal and in [...] elsewhere.

    Text that spells a control token has a backslash before it: \\</s> is text, </s> the token.
    """
    example = dataset[index]
    ids, trained = example["input_ids"].tolist(), (example["labels"] != IGNORE_INDEX).tolist()
    before, after = ("\033[32m", "\033[0m") if colour else ("[", "]")
    control = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special]
    kinds = list(zip(trained, np.isin(ids, control).tolist()))
    whole, text, at = tokenizer.decode(ids), "", 0
    for start, end in pairwise([0, *(i for i in range(1, len(ids)) if kinds[i] != kinds[i - 1]), len(ids)]):
        ends = len(tokenizer.decode(ids[:end]))
        piece = printable(whole[at:ends])
        if not kinds[start][1]:
            piece = control_tokens(tokenizer).sub(r"\\\g<0>", piece)
        begins = trained[start] and not (start and trained[start - 1])
        stops = trained[start] and not (end < len(ids) and trained[end])
        text, at = text + before * begins + piece + after * stops, ends
    return f"{dataset.where(index)}, its trained tokens {'in green' if colour else 'in [...]'}:\n{text}"


class Finding(NamedTuple):
    """Something to know about the data, and the rows where it is."""

    what: str
    rows: list[int] | list[str]  # by number; of several files FILE:NUMBER
    useless: bool = False  # a run on these data is not worth its time

    def __str__(self) -> str:
        if not self.rows:
            return self.what
        return f"{self.what}: {len(self.rows):,} (row{'s' if len(self.rows) > 1 else ''} {first_of(self.rows)})"


def check_data(
    tokenizer, data_args: DataArguments, args: TrainingArguments, config, dataset, evaluation: list[Part]
) -> int:
    """Audit the training data in place of training; the exit code, 1 when a run would be useless.

    Args:
        dataset: a SupervisedDataset over all kept rows.
        evaluation: the files of --eval_data_path.
    """
    if rank() != 0:
        return 0
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    parts = dataset.parts
    findings = [Finding(problem, [], useless=True) for problem in check_vocabulary(tokenizer, config)]
    findings += token_findings(parts, tokenizer, config.vocab_size) + leaks(parts, evaluation)
    planned: dict[str, Any] = {}
    percentiles: dict[str, dict[str, int]] = {}
    text, examples = [*map(describe_part, parts), ""], []
    if len(dataset):
        if max(part.answers().max(initial=0) for part in parts) > 1:
            text[-1:] = [describe_datasets(dataset, None), ""]
        prompts, totals = dataset.prompt_lengths, dataset.lengths
        lengths = {"prompt": prompts, "response": totals - prompts, "total": totals}
        title = f"{len(dataset):,} examples of {', '.join(Path(part.path).name for part in parts)}"
        draw_lengths(folder / "data_lengths.png", title, lengths, args.model_max_length)
        planned, never_reached = plan(totals, args)
        positions, refused = too_many_positions(config, totals)
        if positions:
            too_long = np.flatnonzero(totals > config.max_position_embeddings).tolist()
            numbers = dataset.row_numbers[too_long].tolist() if len(parts) == 1 else map(dataset.where, too_long)
            findings.append(Finding(positions, [*dict.fromkeys(numbers)], refused))
        findings += repeats(parts, tokenizer, data_args.allow_control_tokens)
        findings += text_findings(parts, Rows(data_args, tokenizer)) + never_reached
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
    report = {"data_path": ", ".join(data_args.data_path), "verdict": verdict, "useless": bool(useless)}
    report |= {
        "counts": dataset.counts,
        "percentiles": percentiles,
        "plan": planned,
        "findings": [finding._asdict() for finding in findings],
    }
    (folder / "data_report.json").write_text(json.dumps(report, indent=1) + "\n")
    say("\n".join([*text, *(f"- {finding}" for finding in findings)]))
    say("\n".join(examples), coloured=True)
    say(
        f"\nverdict: {verdict}\nevery row of every finding: {folder / 'data_report.json'}; lengths: {folder / 'data_lengths.png'}"
    )
    return int(bool(useless))


def _found(parts: list[Part], masks: dict[str, list[np.ndarray]]) -> list[Finding]:
    """What each file's rows, by number, have shown."""
    found = []
    for what, rows_of_parts in masks.items():
        rows: Any = [row for rows in rows_of_parts for row in rows.tolist()]
        if len(parts) > 1:
            rows = [f"{part.path}:{row}" for part, rows in zip(parts, rows_of_parts) for row in rows.tolist()]
        if rows:
            found.append(Finding(what, rows))
    return found


def _texts(part: Part, rows: Rows) -> Iterator[tuple[str, str, str]]:
    """(all that is read before the first answer, the questions, the answers) of each kept row of a file."""
    kept = np.isin(part.rows.outcomes, (KEPT, CUT, SHORTENED))
    first = part.rows.first_row
    for number, cells in read_rows(part.path, *rows.how):
        if kept[number - first]:
            yield rows.texts(f"{part.path}, row {number}", cells)


def text_findings(parts: list[Part], rows: Rows) -> list[Finding]:
    """What the cells of the kept rows show, in one pass over the files."""
    template, tokenizer = rows.template, rows.tokenizer
    bare = template.text == "{instruction}" and not rows.rendered
    lines = [line.strip() for form in template.forms for line in PLACE.sub("\n", form).split("\n")]
    frame = [line for line in lines if len(line) > 7]
    control_texts = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    control = control_tokens(tokenizer)
    texts = chain.from_iterable(_texts(part, rows) for part in parts)
    head = list(islice(texts, SAMPLE))
    # a line end behind "### Response:" is no other ending
    endings = Counter(source.rstrip("\r\n").rsplit("\n", 1)[-1][-LONGEST_ENDING:] for _, source, _ in head)
    ending, times = endings.most_common(1)[0]
    if not (bare and ending.strip() and times > max(1, len(head) / 2)):
        ending = ""  # most prompts share none
    facts = (
        (
            hash(prompt),
            hash((prompt, target)),
            control.search(source) or control.search(target),
            prompt.endswith(" "),
            (ending and source.count(ending) > 1) or any(line in source for line in frame),
            bare and not (ending and source.rstrip("\r\n").endswith(ending)),
            (ending and ending in target) or any(line in target for line in frame),
        )
        for prompt, source, target in chain(head, texts)
    )
    table = np.fromiter(facts, "i8, i8, ?, ?, ?, ?, ?")
    prompts, pairs, control_tokens_spelt, spaces, templated, untemplated, headed = (
        table[name] for name in table.dtype.names
    )
    places = np.arange(len(table))
    again, pair_again = (~np.isin(places, np.unique(keys, return_index=True)[1]) for keys in (prompts, pairs))
    common = "prompts do not end as most do" if ending else "prompts look untemplated: they have no common ending"
    becomes = "is the token itself" if rows.data_args.allow_control_tokens else "is encoded as text"
    masks = {
        "rows repeat an earlier one, prompt and response": pair_again,
        "rows have an earlier row's prompt and another response": again & ~pair_again,
        f"rows spell a control token ({', '.join(control_texts[:4])}); it {becomes}": control_tokens_spelt,
        "prompts end in a space: most responses then tokenize differently from what generation sees": spaces,
        "prompts were put into the template before": templated,
        f"{common}; --prompt_template alpaca wraps bare instructions": untemplated,
        "responses hold a line of the prompts' template, which the model will learn to write": headed,
    }
    edges = np.cumsum([len(part.rows.lengths) for part in parts])[:-1]
    return _found(
        parts,
        {
            what: [part.rows.row_numbers[part_mask] for part, part_mask in zip(parts, np.split(mask, edges))]
            for what, mask in masks.items()
        },
    )


def repeats(parts: list[Part], tokenizer: Any, allow_control_tokens: bool) -> list[Finding]:
    """Cells that spell BOS or EOS where a row gets the token anyway."""
    then = "the token stands there twice" if allow_control_tokens else "it is text there, beside the token itself"
    found = {
        f"prompts begin with {tokenizer.bos_token}, which is put there anyway: {then}": 1,
        f"responses end with {tokenizer.eos_token}, which is put there anyway: {then}": 2,
    }
    every = [part.rows for part in parts]
    return _found(
        parts,
        {
            what: [rows.row_numbers[: len(rows.repeats)][rows.repeats & bit > 0] for rows in every]
            for what, bit in found.items()
        },
    )


def leaks(train_parts: list[Part], eval_parts: list[Part]) -> list[Finding]:
    """Evaluation rows whose prompt is also trained on; an --eval_split has none (`hold_out`)."""
    trained = np.concatenate([part.digests() for part in train_parts])
    what = "rows of --eval_data_path have a prompt that is also trained on; they say little about new prompts"
    return _found(eval_parts, {what: [p.rows.row_numbers[p.kept[np.isin(p.digests(), trained)]] for p in eval_parts]})


def token_findings(parts: list[Part], tokenizer: Any, vocabulary_size: int) -> list[Finding]:
    """What the outcomes and the tokens show."""
    every = [part.rows for part in parts]
    byte_ids = [i for token, i in tokenizer.get_vocab().items() if re.fullmatch(r"<0x(?!0[9AD])[0-9A-F]{2}>", token)]
    # GPT-2's family names its EOS as unk too: there every byte is in the vocabulary and nothing is unknown.
    unk_ids = [] if tokenizer.unk_token_id in (None, tokenizer.eos_token_id) else [tokenizer.unk_token_id]
    with_bytes = [_rows_with_ids(rows, byte_ids)[0] for rows in every]
    with_unk = [_rows_with_ids(rows, unk_ids) for rows in every]
    found = {
        "rows dropped: an empty prompt or response": [rows.rows_with("empty") for rows in every],
        "rows dropped: the prompt leaves no room in --model_max_length": [rows.rows_with("no_room") for rows in every],
        "rows dropped: the template shows an earlier turn otherwise later": [
            rows.rows_with("disagreed") for rows in every
        ],
        "rows cut at --model_max_length; they lose their EOS": [rows.rows_with("cut") for rows in every],
        "rows shortened to --model_max_length; they lose their last turns": [
            rows.rows_with("shortened") for rows in every
        ],
        "rows with characters that are not in the vocabulary and became single bytes": with_bytes,
        "rows with characters that the tokenizer does not know and replaced by unk": [
            numbers for numbers, _ in with_unk
        ],
    }
    kept, cut = (sum(map(len, values)) for values in ([r.lengths for r in every], [r.rows_with("cut") for r in every]))
    largest_id, tokens = max(rows.largest_id for rows in every), sum(len(rows.tokens) for rows in every)
    useless = {
        "no row is left to train on": not kept,
        "every row is cut, so no EOS is trained and the model never learns to stop": 0 < kept == cut,
        "most tokens are unk: this is not a tokenizer for these texts": sum(times for _, times in with_unk) * 2
        > tokens,
        f"token id {largest_id} is outside the model's embedding of {vocabulary_size}": largest_id >= vocabulary_size,
    }
    return _found(parts, found) + [Finding(what, [], useless=True) for what, is_so in useless.items() if is_so]


def plan(lengths: np.ndarray, args: TrainingArguments) -> tuple[dict[str, Any], list[Finding]]:
    """Steps, what padding would cost (one epoch, shuffled, cut into micro-batches), and points that are never reached."""
    size, planned = args.per_device_train_batch_size, Arithmetic.of(args, len(lengths))
    padded = np.random.default_rng(args.seed).permutation(lengths)
    padded = np.pad(padded, (0, -len(padded) % size)).reshape(-1, size)
    padded_tokens = int(padded.max(axis=1).astype(np.int64) @ np.count_nonzero(padded, axis=1))
    tokens = int(lengths.sum(dtype=np.int64))
    points = (("save", args.save_strategy, args.save_steps), ("eval", args.eval_strategy, args.eval_steps))
    never_reached = [
        Finding(
            f"--{name}_steps {every:g} is beyond the run's {counted(planned.steps, 'step')}: that point is never reached",
            [],
        )
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

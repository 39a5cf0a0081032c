"""Several files as one set of examples: shares and repeats of their rows, and rows held out for evaluation."""

from typing import NamedTuple

import numpy as np

from sft.data.files import DataFile
from sft.data.token_cache import TokenizedRows
from sft.job import UserError, say

HOLD_OUT_SEED = 0  # the training seed does not decide which rows are held out, nor which make up a share


class Part(NamedTuple):
    """A tokenized file, and which of its rows are examples."""

    path: str
    rows: TokenizedRows
    kept: np.ndarray  # positions among the rows that were kept, in order
    times: float = 1  # as FILE*3 or FILE*0.5 asks for

    @classmethod
    def of(cls, file: DataFile, rows: TokenizedRows) -> "Part":
        """The file's rows, or the share of them that was asked for: the same rows in every run."""
        kept, count = np.arange(len(rows.lengths)), len(rows.lengths)
        if file.times < 1:
            kept = np.sort(np.random.default_rng(HOLD_OUT_SEED).permutation(count)[: round(count * file.times)])
        return cls(file.path, rows, kept, file.times)

    def repeated(self) -> "Part":
        """With each row as often as was asked for."""
        return self._replace(kept=np.tile(self.kept, max(1, int(self.times))))

    def cures(self) -> str:
        """What to do when no row of this file is left."""
        counts, cures = self.rows.counts(), []
        if counts["kept"]:
            cures.append(f"*{self.times:g} of {counts['kept']} rows is none: take a larger share")
        if counts["rows_no_room"]:
            cures.append("raise --model_max_length")
        if counts["rows_empty"]:
            cures.append("fill in the empty prompts and responses, or name other columns")
        if counts["rows_disagreed"]:
            cures.append("train on the last turns alone with --train_on last, or give another --prompt_template")
        return "; ".join(cures)

    def answers(self) -> np.ndarray:
        """How many answers of each example are trained."""
        of_rows = np.searchsorted(self.rows.offsets, self.rows.switches[::2], side="right") - 1
        return np.bincount(of_rows, minlength=len(self.rows.lengths))[self.kept] + 1

    def digests(self) -> np.ndarray:
        """A hash of each example's prompt; it differs between processes."""
        return np.fromiter(self.rows.prompt_digests(), np.int64)[self.kept]


def counts(parts: list[Part]) -> dict[str, int]:
    """The counts of all parts' rows together."""
    every = [part.rows.counts() for part in parts]
    return {name: (max if name == "largest_id" else sum)(each[name] for each in every) for name in every[0]}


def hold_out(parts: list[Part], share: float) -> tuple[list[Part], list[Part]]:
    """Split the examples at random into those to train on and those to evaluate.

    Rows with the same prompt stay together: instruction data repeats prompts, and an evaluation that was trained on
    says nothing. So the held-out share is at most the one asked for, and at least one prompt's rows.
    """
    digests = np.concatenate([part.digests() for part in parts])
    _, first, group = np.unique(digests, return_index=True, return_inverse=True)
    group = np.argsort(np.argsort(first))[group]  # numbered by their first rows: the same in each process
    order = np.random.default_rng(HOLD_OUT_SEED).permutation(len(first))
    sizes_of = np.bincount(group)
    sizes = np.cumsum(sizes_of[order])
    wanted = max(1, round(len(digests) * share))
    held_out = np.isin(group, order[: max(1, np.searchsorted(sizes, wanted, side="right"))])
    if held_out.all():
        raise UserError(
            f"--eval_split {share:g} leaves none of {len(digests)} examples to train on; they have {len(first)} different "
            "prompts. Give a smaller share, or evaluation rows of their own with --eval_data_path."
        )
    if not 0.5 <= held_out.sum() / wanted <= 2:
        say(
            f"warning: --eval_split {share:g} asks for {wanted:,} of {len(digests):,} examples, and {held_out.sum():,} are held out: "
            f"rows with the same prompt stay together, and the largest group has {sizes_of.max():,}"
        )
    masks = np.split(held_out, np.cumsum([len(part.kept) for part in parts])[:-1])
    train, evaluation = (
        [part._replace(kept=part.kept[mask == side]) for part, mask in zip(parts, masks)] for side in (False, True)
    )
    return train, [part for part in evaluation if len(part.kept)]

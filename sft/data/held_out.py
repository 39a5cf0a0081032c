"""Hold rows out for evaluation: the same in every run, and none with a prompt that is trained on."""

import numpy as np

from sft.data.token_cache import TokenizedRows
from sft.job import UserError

SEED = 0  # the training seed does not decide which rows are held out


def hold_out(rows: TokenizedRows, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Split the kept rows at random into those to train on and those to evaluate, as positions in order.

    Rows with the same prompt stay together: instruction data repeats prompts, and an evaluation that was trained on says
    nothing. So the held-out share is at most the one asked for, and at least one prompt's rows.
    """
    digests = list(rows.prompt_digests())
    _, first, group = np.unique(digests, return_index=True, return_inverse=True)
    group = np.argsort(np.argsort(first))[group]  # numbered by their first rows: the same in each process
    order = np.random.default_rng(SEED).permutation(len(first))
    sizes = np.bincount(group)[order]
    wanted = max(1, round(len(digests) * share))
    held_out = np.isin(group, order[: max(1, np.searchsorted(np.cumsum(sizes), wanted, side="right"))])
    if held_out.all():
        raise UserError(
            f"--eval_split {share:g} leaves none of {len(digests)} examples to train on; they have {len(first)} different "
            "prompts. Give a smaller share, or evaluation rows of their own with --eval_data_path."
        )
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)

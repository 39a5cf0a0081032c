"""Rows of several files as one set, on parts written by hand."""

import numpy as np

from sft.data import mixture
from sft.data.token_cache import TokenizedRows


def part(largest_id: int = 9, switches=(), path="a.csv") -> mixture.Part:
    """Two rows, of 3 and 6 tokens, each with a prompt of one."""
    lengths, outcomes = np.array([3, 6], np.int32), np.array([0, 2, 0], np.uint8)  # the second row of the file is empty
    rows = TokenizedRows("", np.arange(9, dtype=np.int32), lengths, np.ones(2, np.int32), outcomes, largest_id)
    rows.switches = np.array(switches, np.int64)
    return mixture.Part(path, rows, np.arange(2))


def test_counts_are_summed_and_the_largest_id_is_the_largest():
    found = mixture.counts([part(largest_id=7), part(largest_id=5)])
    assert (found["rows_read"], found["rows_empty"], found["kept"], found["largest_id"]) == (6, 2, 4, 7)


def test_each_trained_answer_of_an_example_counts():
    assert part().answers().tolist() == [1, 1]
    assert part(switches=[5, 6, 7, 8]).answers().tolist() == [
        1,
        3,
    ]  # the second row trains, pauses, trains, pauses, trains

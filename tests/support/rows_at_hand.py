"""Cells that have broken readers of CSV, and what becomes of rows."""

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from sft.job import UserError

MANY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

# Everything that has broken a CSV reader before: line ends, quotes, a BOM, marks that combine, text from right to left.
HAZARDS = st.sampled_from(
    [
        "\n",
        "\r\n",
        "\r",
        '"',
        '""',
        ",",
        "\ufeff",
        "e\u0301",
        "👩‍👩‍👧",
        "שלום",
        "\u202e",
        "\x1b[31m",
        "\x85",
        "\u2028",
        "NA",
        "18",
        " ",
    ]
)
CELLS = st.lists(
    st.one_of(HAZARDS, st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)),
    max_size=6,
).map("".join)


def problems_of(function, *args, **kwargs) -> list[str]:
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    return caught.value.problems


def examples_of(dataset) -> list[tuple[list[int], list[int]]]:
    return [(example["input_ids"].tolist(), example["labels"].tolist()) for example in dataset]

"""docs/models.md says what the proof says."""

import models
import pytest
from scripts import ROOT

PAGE = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("kind", ["llama", "gemma2", "granite", "mixtral", "gpt_oss", "bloom", "lfm2", "stablelm"])
def test_the_page_says_what_the_proof_says(kind):
    verdict = models.row(kind).split("|")[2].strip()
    assert f"\n| {kind} | {verdict} |" in PAGE


def test_every_architecture_is_on_the_page_with_two_equal_losses():
    rows = [line.split("|")[1:-1] for line in PAGE.splitlines() if line.startswith("| ")][1:]
    assert [row[0].strip() for row in rows] == [*models.MODELS]
    assert all(abs(float(run) / float(own) - 1) < 1e-6 for _, _, run, own, _, _ in rows)

"""Torch's switch is on while a checkpoint is loaded, and what the user had set comes back."""

import os

import pytest

from sft.model.safe_loads import SWITCH, safe_loads


@pytest.mark.parametrize("before", [None, "0", "1"])
def test_the_switch_is_as_it_was(monkeypatch, before):
    monkeypatch.delenv(SWITCH, raising=False)
    if before is not None:
        monkeypatch.setenv(SWITCH, before)
    with pytest.raises(KeyError), safe_loads(None, deepspeed=False):
        assert os.environ[SWITCH] == "1"
        raise KeyError
    assert os.environ.get(SWITCH) == before

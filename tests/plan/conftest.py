"""What the tests of the plan share."""

import importlib.util

import pytest


@pytest.fixture
def installed(monkeypatch) -> set[str]:
    """Liger counts as installed only in a test that adds it."""
    stock, there = importlib.util.find_spec, set()

    def find_spec(name, *package):
        if name == "liger_kernel":
            return name if name in there else None
        return stock(name, *package)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    return there

"""A model that is not there is told at once: the hub is asked once, and never about a path."""

from unittest.mock import MagicMock

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import RepositoryNotFoundError

from sft.model.find import not_found


@pytest.fixture
def asked(monkeypatch) -> list:
    """Names that the hub was asked for; it does not answer."""
    names = []

    def model_info(_, name, timeout):
        names.append(name)
        raise ConnectionError("no route\nand more")

    monkeypatch.setattr(HfApi, "model_info", model_info)
    return names


def test_a_folder_that_is_not_there_is_named_with_the_one_that_is(asked, tmp_path, monkeypatch):
    (tmp_path / "output" / "tiny-llama").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert not_found("output/tiny-llama") is None
    assert not_found("./output/tiny_llama") == "./output/tiny_llama: no such folder (did you mean output/tiny-llama?)."
    assert not_found("./output/other-one") == "./output/other-one: no such folder."  # is not meant by that
    assert not_found("/no/such/model") == "/no/such/model: no such folder."
    assert not_found("output/tuned/model") == "output/tuned/model: no such folder."  # not the form of a repository
    assert asked == []
    assert not_found("output/tiny_llama") == (
        "output/tiny_llama: no such folder (did you mean output/tiny-llama?), and the hub does not answer (ConnectionError: no "
        "route). Give a folder that holds the model."
    )
    assert asked == ["output/tiny_llama"]


def test_what_the_hub_says_is_one_sentence(monkeypatch, tmp_path):
    def model_info(_, name, timeout):
        if name == "there/model":
            return
        raise RepositoryNotFoundError("404", response=MagicMock())

    monkeypatch.setattr(HfApi, "model_info", model_info)
    assert not_found("there/model") is None
    assert not_found("mistyped/model") == (
        "mistyped/model: no such folder, and no such repository on the hub. Correct the name; a private one needs: hf auth login"
    )


def test_a_downloaded_model_needs_no_hub(asked, tmp_path):
    commit = tmp_path / "models--some--model" / "snapshots" / "abc"
    commit.mkdir(parents=True)
    (commit / "config.json").write_text("{}")
    (tmp_path / "models--some--model" / "refs").mkdir()
    (tmp_path / "models--some--model" / "refs" / "main").write_text("abc")
    assert not_found("some/model", str(tmp_path)) is None
    assert asked == []

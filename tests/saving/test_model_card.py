"""The card next to a model."""

import contextlib
import copy
import io
import re

import pytest
from huggingface_hub import ModelCard
from watched import TEMPLATE

from sft import generate
from sft.saving import model_card


def run_the_snippet(folder, monkeypatch):
    """What the Python in the card prints, run as a reader would."""
    monkeypatch.chdir(folder.parent)
    code = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)[1]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "README.md", "exec"), {})
    return code, printed.getvalue()


def answer_of(folder, instruction):
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        generate.main(["--model", str(folder), "--instruction", instruction, "--max_new_tokens", "256"])
    return printed.getvalue()


def test_the_card(watched):
    card = (watched.folder / "README.md").read_text()
    metadata = card.split("---\n")[1]
    assert "library_name: transformers\nlicense: other\nlicense_name: as-the-base-model\n" in metadata
    assert "pipeline_tag: text-generation\ntags:\n- instruction-tuning\n- sft\n" in metadata
    assert "base_model" not in metadata and str(watched.folder.parent) not in card
    assert "\nvllm serve ./packed\n" in card and "ollama create packed -f ./packed/Modelfile\n" in card
    assert ModelCard.load(watched.folder / "README.md").data.license == "other"
    final = watched.record["final"]
    for row in (
        "| base model | `tiny_llama0` |",
        f"| training rows | 48 of 64 in `questions.csv` (blake2b `{watched.record['data']['train']['blake2b']}`) |",
        "| examples per optimizer step | 6 |",
        "| optimizer steps | 8 of 8 (1 epoch) |",
        f"| evaluation | loss {final['eval_loss']:.4f}, perplexity {final['eval_perplexity']:.4g} |",
    ):
        assert row in card
    alone = "on pairs of instruction and response. The answers alone were trained on.\n"
    assert f"A full fine-tune of `tiny_llama0` {alone}" in card
    assert f"````text\n{TEMPLATE}\n````" in card and "![loss, learning rate and speed](loss.png)" in card


def test_the_card_says_what_was_trained_on(watched, tmp_path):
    changed = copy.deepcopy(watched.record)
    changed["flags"]["data"] |= {"messages": "messages", "train_on_prompt": True}
    model_card.write_card(tmp_path, changed)
    assert " on conversations, the prompts included.\n" in (tmp_path / "README.md").read_text()


def test_a_template_with_fences_and_a_file_with_a_bar_in_its_name_leave_the_card_whole(watched, tmp_path):
    changed = copy.deepcopy(watched.record)
    changed["template"]["text"] = "`````\n````\n{instruction}"
    changed["data"]["train"]["path"] = "/data/a|b\nc\x1b[2J.csv"
    model_card.write_card(tmp_path, changed)
    card = (tmp_path / "README.md").read_text()
    assert "\n``````text\n`````\n````\n{instruction}\n``````\n" in card
    assert r"48 of 64 in `a\|b c\x1b[2J.csv` (blake2b" in card


def test_the_snippet_of_the_card_answers_as_the_command_does(watched, monkeypatch):
    _, printed = run_the_snippet(watched.folder, monkeypatch)
    assert printed == answer_of(watched.folder, "Name three primary colours.")


def test_the_snippet_takes_control_tokens_as_the_training_did():
    asked = [model_card.snippet("mine", "a folder", False, False, allowed) for allowed in (False, True)]
    assert ["tokenizer(prompt, split_special_tokens=True, return_tensors" in text for text in asked] == [True, False]
    assert 'tokenizer(prompt, return_tensors="pt")' in asked[1]


@pytest.mark.slow
def test_the_snippet_of_an_adapter(watched_adapter, monkeypatch):
    run = watched_adapter
    code, printed = run_the_snippet(run.folder, monkeypatch)
    assert "needs `pip install peft`" in code and "library_name: peft" in (run.folder / "README.md").read_text()
    assert printed == answer_of(run.folder, "Name three primary colours.")
    assert run.record["model"]["trainable_parameters"] < run.record["model"]["parameters"] / 2


def test_the_card_names_a_base_on_the_hub_and_takes_its_licence(watched, tmp_path, monkeypatch):
    (tmp_path / "theirs.md").write_text("---\nlicense: other\nlicense_name: llama2\nlicense_link: https://x.org\n---\n")
    monkeypatch.setattr(model_card, "try_to_load_from_cache", lambda *wanted: str(tmp_path / "theirs.md"))
    template = {"name": "none", "text": "{instruction}"}
    record = watched.record | {"model": {"name": "openlm-research/open_llama_7b"}, "template": template}
    record["final"] = record["final"] | {"limits": ["It cannot whistle."]}
    model_card.write_card(tmp_path, record, "me/mine")
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.base_model, card.data.license) == ("openlm-research/open_llama_7b", "other")
    assert (card.data.license_name, card.data.license_link) == ("llama2", "https://x.org")
    assert "It was trained on whole prompts (completions)" in card.text and "\nIt cannot whistle.\n" in card.text
    assert (
        "\n# mine\n" in card.text and "vllm serve me/mine\n" in card.text and "--apply_chat_template" not in card.text
    )  # no such file there
    (tmp_path / "theirs.md").write_text("---\nlicense: [\n---\n")
    assert model_card.licence("openlm-research/open_llama_7b") == {
        "license": "other",
        "license_name": "as-the-base-model",
    }

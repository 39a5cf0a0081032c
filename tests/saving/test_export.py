"""An export is read back and proved, and every way in which it could be wrong is seen."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft.saving import export


def test_complete_json_says_what_was_proved(whole_run):
    complete = json.loads((whole_run / "COMPLETE.json").read_text())
    assert complete["step"] == 16
    assert complete["bytes"] == {"model.safetensors": (whole_run / "model.safetensors").stat().st_size}
    assert [line.split(" ")[0] for line in complete["proved"]] == ["21", "21", "the", "the"]
    assert export.is_finished(whole_run)
    assert not export.is_finished(whole_run / "checkpoint-16")


def damaged(change):
    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def set_value(name, value):
    return damaged(lambda tensors: tensors[name].__setitem__(0, value))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (damaged(lambda t: t.pop("model.norm.weight")), "model.norm.weight was not saved"),
        (damaged(lambda t: t.update(extra=torch.ones(1))), "holds extra, which the model does not have"),
        (damaged(lambda t: t.update({"model.norm.weight": t["model.norm.weight"].bfloat16()})), "dtype is torch.bfloat16, not torch.float32"),
        (damaged(lambda t: t.update({"model.norm.weight": t["model.norm.weight"][:-1]})), r"shape is \[31\], not \[32\]"),
        (damaged(lambda t: t["model.norm.weight"].zero_()), "model.norm.weight is all zero"),
        (set_value("model.norm.weight", float("nan")), "model.norm.weight holds NaN or infinity"),
        (set_value("model.norm.weight", 7.0), "its bytes are not the trained weight's"),
    ],
)  # fmt: skip
def test_the_proof_sees_a_wrong_export(whole_run, tmp_path, damage, said):
    written = export.describe_weights(load_file(whole_run / "model.safetensors"))
    shutil.copy(whole_run / "model.safetensors", tmp_path)
    assert export.check_weights(tmp_path, written) == []
    damage(tmp_path)
    assert re.search(said, "; ".join(export.check_weights(tmp_path, written)))


def test_the_proof_sees_an_incomplete_index(tmp_path):
    weights = {"a": torch.ones(2), "b": torch.ones(3)}
    for name in weights:
        save_file({name: weights[name]}, tmp_path / f"{name}.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}))
    assert export.check_weights(tmp_path, export.describe_weights(weights)) == []
    index.write_text(json.dumps({"weight_map": {"a": "a.safetensors", "b": "a.safetensors"}}))
    problems = export.check_weights(tmp_path, export.describe_weights(weights))
    assert "model.safetensors.index.json and a.safetensors disagree about b" in problems
    (tmp_path / "b.safetensors").unlink()
    index.write_text(json.dumps({"weight_map": {"a": "a.safetensors", "b": "b.safetensors"}}))
    assert (
        "names b.safetensors, which is missing" in export.check_weights(tmp_path, export.describe_weights(weights))[0]
    )


def test_tied_embeddings_are_proved_once():
    embedding = torch.ones(4, 2)
    written = export.describe_weights({"model.embed_tokens.weight": embedding, "lm_head.weight": embedding})
    assert written["lm_head.weight"]["twins"] == ["model.embed_tokens.weight"]


def test_the_proof_sees_another_models_logits(whole_run, tiny_llama):
    ids = torch.tensor([[1, 5, 9]])
    model = AutoModelForCausalLM.from_pretrained(whole_run)
    with torch.no_grad():
        logits = model(ids).logits
    assert export.check_logits(model, ids, logits, exact=True) == []
    other = AutoModelForCausalLM.from_pretrained(tiny_llama)
    for exact in (True, False):
        assert "logits differ from the trained model's by" in export.check_logits(other, ids, logits, exact)[0]
    nothing = torch.full_like(logits, float("nan"))
    assert export.check_logits(model, ids, nothing, exact=False) != []


def test_the_proof_sees_a_tokenizer_with_other_ids(whole_run):
    tokenizer = AutoTokenizer.from_pretrained(whole_run)
    assert export.check_tokenizer(whole_run, tokenizer, ["What is 1 plus 2?"], 320) == []
    other = AutoTokenizer.from_pretrained(whole_run)
    other.add_tokens(["plus"])
    assert (
        "other ids for 'What is 1 plus 2?'" in export.check_tokenizer(whole_run, other, ["What is 1 plus 2?"], 320)[0]
    )
    assert "and the embedding 100 rows" in export.check_tokenizer(whole_run, tokenizer, ["What is 1 plus 2?"], 100)[0]


def test_cast_weights_keeps_tied_weights_tied():
    weight = torch.ones(2, 2)
    cast = export.cast_weights({"a": weight, "b": weight, "c": torch.ones(2, 2), "n": torch.tensor(3)}, torch.bfloat16)
    assert cast["a"] is cast["b"]
    assert cast["a"] is not cast["c"]
    assert (cast["a"].dtype, cast["n"].dtype) == (torch.bfloat16, torch.int64)

"""Write what an export holds besides weights, in the form that each program reads: transformers 4 and 5, llama.cpp, servers.

docs/clients.md names the programs that were tried, with the result.
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from sentencepiece import sentencepiece_model_pb2
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sft.data.llama_tokenizer import MADE_FROM_MERGES
from sft.data.template import TEMPLATE_FILES, Template, split_form
from sft.outside import read_object

CHAT_TEMPLATE_FILE, SENTENCEPIECE_FILE, MODELFILE = "chat_template.jinja", "tokenizer.model", "Modelfile"
# of the machine or the moment, not of the tokenizer: transformers 5.23 writes the first two, older ones wrote the others
PASSING = "is_local local_files_only name_or_path tokenizer_file vocab_file special_tokens_map_file cache_dir".split()
NO_LENGTH = 1e20  # transformers' LARGE_INTEGER: a tokenizer without a length has 1e30
COPIED = re.compile(
    r"tokenizer.*|special_tokens_map\.json|chat_template\.jinja|prompt_template\.\w+|Modelfile|vocab\.json|merges\.txt"
)


def write_tokenizer(
    tokenizer: PreTrainedTokenizerBase, folder: Path, template: Template, positions: int | None
) -> None:
    """Save the tokenizer, the prompt template, and the chat template that renders the trained ids.

    Args:
        template: what training put its rows into.
        positions: how many the model has: the longest text that a client may send, where the base's tokenizer names no length.
    """
    tokenizer.save_pretrained(folder)
    # the base's template was not trained
    for name in (CHAT_TEMPLATE_FILE, SENTENCEPIECE_FILE, MODELFILE, *TEMPLATE_FILES):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "additional_chat_templates", ignore_errors=True)
    (folder / template.file_name).write_text(template.text, encoding="utf-8", newline="")
    config = read_object(folder / "tokenizer_config.json")
    config = {
        key: value for key, value in config.items() if value is not None and key not in (*PASSING, "chat_template")
    }
    if positions and tokenizer.model_max_length > NO_LENGTH:
        config["model_max_length"] = positions
    if tokenizer.is_fast:
        config |= _settings_for_every_reader(tokenizer)
        # two names of one list: transformers 4 fails on the new one
        config |= {"additional_special_tokens": extra} if (extra := config.pop("extra_special_tokens", None)) else {}
        backend = read_object(folder / "tokenizer.json") | {"truncation": None, "padding": None}
        if template.forms:  # a later turn follows an EOS, behind which training put no prefix
            backend["pre_tokenizer"] = _prefix_after_bos(backend["pre_tokenizer"])
        write_json(folder / "tokenizer.json", backend)
        if model := _sentencepiece_model(tokenizer, backend):
            (folder / SENTENCEPIECE_FILE).write_bytes(model)
            if not template.forms:
                # llama.cpp would put a space behind each control token, also behind an earlier turn's EOS, where training put none
                config["add_prefix_space"] = False  # the chat template spells the one behind BOS
    write_json(folder / "tokenizer_config.json", config)
    as_text = not template.control_tokens and any(control_tokens_in(tokenizer, form) for form in template.forms)
    if template.jinja and not as_text:
        bos = ""
        if not template.begins_with_bos and tokenizer("").input_ids == [tokenizer.bos_token_id]:
            bos = "{{- bos_token -}}\n" if template.forms or not _puts_space(tokenizer) else '{{- bos_token + " " -}}\n'
        (folder / CHAT_TEMPLATE_FILE).write_text(bos + template.jinja, encoding="utf-8", newline="")
        for before, *asked, after in map(split_form, template.forms[-1:]):
            if asked == ["instruction"]:
                modelfile = ollama_modelfile(f"{before}{{instruction}}{after}")
                (folder / MODELFILE).write_text(modelfile, encoding="utf-8", newline="")


def ollama_modelfile(template: str) -> str:
    """Ollama's recipe for the GGUF next to it: the template in Go's language, where {{ is spelled {{ "{{" }}."""
    before, after = (part.replace("{{", '{{ "{{" }}') for part in template.split("{instruction}"))
    return f'FROM ./model.gguf\nTEMPLATE """{before}{{{{ .Prompt }}}}{after}"""\n'


def control_tokens_in(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    """The control tokens that a text spells. Training reads them as text, and every chat client as the token itself."""
    return [
        token.content for token in tokenizer.added_tokens_decoder.values() if token.special and token.content in text
    ]


def _settings_for_every_reader(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Keys of tokenizer_config.json with which each program takes tokenizer.json as it is."""
    # transformers 5 builds the steps of other classes anew, whatever the file has; 4 does not know its name TokenizersBackend
    settings: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    # llama.cpp reads here which tokens follow those of tokenizer.model
    settings["added_tokens_decoder"] = {i: t.__getstate__() for i, t in tokenizer.added_tokens_decoder.items()}
    if (ids := tokenizer("").input_ids) in ([], [tokenizer.bos_token_id]):
        # llama.cpp and onnxruntime-genai put one before a SentencePiece prompt otherwise
        settings["add_bos_token"] = bool(ids)
    return settings | {"add_prefix_space": _puts_space(tokenizer)}


def _puts_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a text gets a space before its first letter."""
    (first, *_) = tokenizer.convert_ids_to_tokens(tokenizer("a", add_special_tokens=False).input_ids)
    return first.startswith(("▁", "Ġ"))


def _prefix_after_bos(part: dict | None) -> dict | None:
    """A pre-tokenizer (its JSON) that puts the dummy prefix also where BOS is spelled before the text, as llama.cpp does."""
    if part and part["type"] == "Sequence":
        return part | {"pretokenizers": [_prefix_after_bos(inner) for inner in part["pretokenizers"]]}
    return part | {"prepend_scheme": "always"} if part and part.get("prepend_scheme") == "first" else part


# ----------------------------------------------------------------------------------------------------- SentencePiece


def _sentencepiece_model(tokenizer: PreTrainedTokenizerBase, backend: dict) -> bytes | None:
    """The base's tokenizer.model, or one made from a tokenizer.json of that kind: llama.cpp loses the merges of a tokenizer.json."""
    reference = getattr(tokenizer, "reference", None)
    if reference and reference.name == "SentencePiece":
        return Path(reference.file).read_bytes()
    model = backend["model"]
    numbered = sorted(tokenizer.get_vocab().values()) == list(range(len(tokenizer)))
    if model["type"] != "BPE" or not model.get("byte_fallback") or tokenizer.unk_token is None or not numbered:
        return None
    return _from_merges(tokenizer, backend)


def _from_merges(tokenizer: PreTrainedTokenizerBase, backend: dict) -> bytes:
    """A SentencePiece model with these tokens, in which an earlier merge has a better score."""
    scores: dict[str, int] = {}
    for rank, merge in enumerate(backend["model"]["merges"]):
        scores.setdefault("".join(merge if isinstance(merge, list) else merge.split(" ")), -rank)
    added = {token["content"]: token["special"] for token in backend["added_tokens"]}
    unk, bos, eos, vocab = tokenizer.unk_token, tokenizer.bos_token, tokenizer.eos_token, tokenizer.get_vocab()
    Piece = sentencepiece_model_pb2.ModelProto.SentencePiece  # type: ignore[attr-defined]  # protobuf makes it on import

    def kind(token: str) -> int:
        if token in added and token != unk:
            return Piece.CONTROL if added[token] else Piece.USER_DEFINED
        return Piece.UNKNOWN if token == unk else Piece.BYTE if re.fullmatch("<0x[0-9A-F]{2}>", token) else Piece.NORMAL

    pieces = [
        Piece(piece=token, score=scores.get(token, -1e9), type=kind(token))
        for token in sorted(vocab, key=vocab.__getitem__)
    ]
    spec = {"model_type": "BPE", "byte_fallback": True, "vocab_size": len(pieces), "model_prefix": MADE_FROM_MERGES}
    spec |= {"unk_id": vocab[unk], "bos_id": vocab.get(bos, -1), "eos_id": vocab.get(eos, -1), "pad_id": -1}
    spec |= {"unk_piece": unk, "bos_piece": bos or "", "eos_piece": eos or ""}
    normal = {"name": "identity", "add_dummy_prefix": _puts_space(tokenizer), "remove_extra_whitespaces": False}
    proto = sentencepiece_model_pb2.ModelProto(pieces=pieces, trainer_spec=spec, normalizer_spec=normal)  # type: ignore[attr-defined]
    return proto.SerializeToString()


# ------------------------------------------------------------------------------------------------------------ config


def finish_config(folder: Path, dtype: torch.dtype) -> None:
    """Write into config.json the type of the saved weights, and the rope's numbers where transformers 4 reads them too."""
    config = read_object(folder / "config.json")
    config["dtype"] = str(dtype).removeprefix("torch.")  # save_pretrained (5.23) writes the type of the live weights
    rope = config.get("rope_parameters") or {}
    config |= {name: rope[name] for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    if rope.get("rope_type", "default") != "default":
        config["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
    write_json(folder / "config.json", config)


def end_as_trained(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Name the trained EOS and the pad in the generation config; how the base samples stays."""
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.eos_token_id = tokenizer.eos_token_id


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy all that belongs to the tokenizer and to the prompt, with the modes that new files get."""
    for file in source.iterdir():
        if COPIED.fullmatch(file.name):
            shutil.copyfile(file, target / file.name)


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")

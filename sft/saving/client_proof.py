"""Ask the exported folder as a client asks, on the run's own rows, and compare the ids with those that were trained."""

import re
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from transformers import PreTrainedTokenizerBase

from sft import IGNORE_INDEX
from sft.data.llama_tokenizer import MADE_FROM_MERGES
from sft.data.template import TEMPLATE_FILES, Template
from sft.outside import counted, read_object
from sft.saving.export_files import CHAT_TEMPLATE_FILE, SENTENCEPIECE_FILE, control_tokens_in

ROWS = 200
LLAMA_CPP = "llama.cpp and what builds on it (Ollama)"
MARK = "\ue000"  # stands for a message's text


class Asked(NamedTuple):
    """What asking showed: what is wrong, what is equal, and what other programs cannot do with this model."""

    problems: list[str]
    proved: list[str]
    limits: list[str]


def trained_prompts(dataset, tokenizer: PreTrainedTokenizerBase, template: Template) -> list[tuple[str, list[int]]]:
    """(instruction, ids of its prompt) of the first rows, without those that no client can ask.

    Not every text can be had back from its ids, and a control token that a cell spells is a token in a client, and text in most trainings.
    """
    if not template.jinja:
        return []
    asked = [{"role": "user", "content": MARK}]
    options = {"chat_template": template.jinja, "add_generation_prompt": True, "tokenize": False}
    before, after = str(tokenizer.apply_chat_template(asked, **options)).split(MARK)
    # BOS; a template may spell one where none is put
    put = [] if template.begins_with_bos else tokenizer("").input_ids
    found = []
    for example in islice(dataset, ROWS):
        ids = example["input_ids"][: int((example["labels"] != IGNORE_INDEX).int().argmax())].tolist()
        without_bos = ids[len(put) :] if ids[: len(put)] == put else ids
        text = str(tokenizer.decode(without_bos, clean_up_tokenization_spaces=False))
        again = tokenizer(text, add_special_tokens=not template.begins_with_bos, verbose=False).input_ids
        if again == ids and text.startswith(before) and text.endswith(after):
            instruction = text[len(before) : len(text) - len(after)]
            if template.control_tokens or not control_tokens_in(tokenizer, instruction):
                found.append((instruction, ids))
    return found


def ask_as_clients(
    folder: Path, tokenizer: PreTrainedTokenizerBase, prompts: list[tuple[str, list[int]]], texts: list[str]
) -> Asked:
    """Compare the ids that the folder gives to prompts and texts with the trained ones, and with those of its SentencePiece file.

    Args:
        tokenizer: the folder's.
        prompts: of `trained_prompts`.
        texts: whole rows.
    """
    asked = Asked([], [], [])
    chatted = (folder / CHAT_TEMPLATE_FILE).is_file()
    asks = [[{"role": "user", "content": instruction}] for instruction, _ in prompts if chatted]
    if chatted:
        wrong = [
            instruction
            for ask, (instruction, ids) in zip(asks, prompts)
            if ids != tokenizer.apply_chat_template(ask, add_generation_prompt=True, return_dict=False)
        ]
        asked.problems.extend(
            f"{CHAT_TEMPLATE_FILE} gives other ids than training to {len(wrong)} of {len(prompts)} prompts, first {text[:60]!r}"
            for text in wrong[:1]
        )
        if prompts:  # without one, each spells a control token, which a client reads as the token itself
            asked.proved.append(f"the chat template gives the trained ids to {counted(len(prompts), 'prompt')}")
    else:
        asked.limits.append(
            "There is no chat template: the trained prompt has columns that a chat has no place for, or spells a control token, which "
            "every chat client reads as the token itself, whatever it was in training. Send whole prompts, as completions."
        )
    texts = [text for text in texts if not control_tokens_in(tokenizer, text)]
    ids = [tokenizer(text, add_special_tokens=False, verbose=False).input_ids for text in texts]
    backend = read_object(folder / "tokenizer.json") if tokenizer.is_fast else {}
    settings = read_object(folder / "tokenizer_config.json")
    model = (folder / SENTENCEPIECE_FILE).read_bytes() if (folder / SENTENCEPIECE_FILE).is_file() else b""
    if model:
        own = sentencepiece.SentencePieceProcessor(model_proto=model).encode(texts)
        unequal = [text for text, one, other in zip(texts, ids, own) if one != other]
        if _proto(model).trainer_spec.model_prefix != MADE_FROM_MERGES:
            asked.problems.extend(
                f"{SENTENCEPIECE_FILE} gives other ids than tokenizer.json to {len(unequal)} of {len(texts)} rows, first {text[:60]!r}"
                for text in unequal[:1]
            )
        if not unequal:
            asked.proved.append(f"{SENTENCEPIECE_FILE} gives tokenizer.json's ids to {counted(len(texts), 'row')}")
        different = sum(one != other for one, other in zip(ids, in_llama_cpp(model, texts)))
        if settings["add_prefix_space"] != _proto(model).normalizer_spec.add_dummy_prefix:
            asked.limits.append(
                f"{LLAMA_CPP} put no space before a text, because they would put one behind every control token too: sent as completions, the "
                f"{len(texts)} training rows get the trained ids where a space begins them, and others without. Chats need nothing."
            )
    elif backend.get("model", {}).get("byte_fallback"):
        different = len(texts)  # its converter takes the merges of such a tokenizer.json for nothing
    else:
        normalizer = tokenizer.is_fast and tokenizer.backend_tokenizer.normalizer
        different = sum(normalizer.normalize_str(text) != text for text in texts) if normalizer else 0
    if different:
        asked.limits.append(
            f"{LLAMA_CPP} give other ids to {different} of {len(texts)} training rows: a GGUF has no word for what this tokenizer does to a text."
        )
    if (folder / TEMPLATE_FILES[1]).is_file():
        bos = tokenizer.bos_token if settings.get("add_bos_token") else ""  # a server puts it, once
        chats = [str(tokenizer.apply_chat_template(ask, add_generation_prompt=True, tokenize=False)) for ask in asks]
        chats = [chat.removeprefix(bos) for chat in chats]
        control = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        found = (
            in_llama_cpp(model, chats, control)
            if model
            else [tokenizer(chat, add_special_tokens=False).input_ids for chat in chats]
        )
        unasked = sum(ids != [tokenizer.bos_token_id] * bool(bos) + one for (_, ids), one in zip(prompts, found))
        if unasked:
            asked.limits.append(
                f"{LLAMA_CPP} give other ids to {unasked} of {len(prompts)} prompts sent as a chat: they put a BOS, or no space, before what this "
                "chat template renders, and training did not."
            )
    return asked


def _proto(model: bytes):
    return sentencepiece_model_pb2.ModelProto.FromString(model)  # type: ignore[attr-defined]  # protobuf makes it on import


def in_llama_cpp(model: bytes, texts: list[str], control: dict[str, int] | None = None) -> list[list[int]]:
    """The ids that llama.cpp (src/llama-vocab.cpp, 0.3.36 of llama-cpp-python) makes with a SentencePiece model.

    It knows no normalizer of SentencePiece's, and puts the dummy prefix also after a user-defined piece.

    Args:
        control: ids of the control tokens that a chat template spells; such a model's GGUF puts no prefix.
    """
    proto = _proto(model)
    prefix = control is None and proto.normalizer_spec.add_dummy_prefix
    plain = {"name": "identity", "add_dummy_prefix": prefix, "remove_extra_whitespaces": False}
    proto = type(proto)(pieces=proto.pieces, trainer_spec=proto.trainer_spec, normalizer_spec=plain)
    pieces = {p.piece.replace("▁", " "): i for i, p in enumerate(proto.pieces) if p.type == p.USER_DEFINED}
    pieces |= control or {}
    longest_first = sorted(pieces, key=len, reverse=True)
    split = re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
    encode = sentencepiece.SentencePieceProcessor(model_proto=proto.SerializeToString()).encode
    return [
        [i for part in split.split(text) if part for i in ([pieces[part]] if part in pieces else encode(part))]
        for text in texts
    ]

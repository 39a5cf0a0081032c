"""A LLaMA tokenizer that equals SentencePiece, a fast XGen tokenizer, and the ids of prompts and responses.

transformers 5.23 mis-converts a folder that has only `tokenizer.model` (merges ordered by id instead of by piece score, the
normalizer dropped), and cannot load XGen's published tokenizer at all. Both are built here, without remote code.
"""

import copy
import json
import os
import threading
from array import array
from collections.abc import Callable
from itertools import chain

import numpy as np
import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode, generate_merges
from transformers.models.auto.tokenization_auto import get_tokenizer_config
from transformers.utils.hub import cached_file

from sft.arguments import UserError, say

SPACE = "▁"  # U+2581, how SentencePiece writes a space
LEADING_SPACE, RUN_OF_SPACES, LAST_SPACES = r"\A ", " {2,}", rf"[ {SPACE}]+\z"

# What tokenizers have been seen to differ on: runs of spaces, edges, line ends, code, marks, scripts, control texts, length.
PROBES = [
    "The quick brown fox jumps over the lazy dog.",
    "cheese.  Rick said:   three,    four, and a run of" + " " * 40 + "forty.",
    " one space first",
    "   three spaces first",
    "one space last ",
    "three spaces last   ",
    "   ",
    "tab\tand\t\ttwo tabs\t",
    "\tfirst",
    "line\nline\n\nblank line\r\nwindows\r",
    "\n\n\nfirst",
    " \n \n ",
    "def f(x):\n    if x > 0:\n        return {'a': [1, 2, 3]}  # why?\n\n\tprint(f\"{x!r:>10}\")\n",
    "for (int i = 0; i < n; ++i) { a[i] += b[i] & 0xFF; } // https://example.org/a?b=c&d=%20",
    '<p class="x">1 &lt; 2</p></s><s><unk><pad>[INST] <|endoftext|> <0x0A>',
    "3.14159 1,000,000 12345678901234567890 1e-9 ½ ² ①",
    "don't WON'T they're we'll I'd o'clock aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "naïve café Ångström e\u0301 A\u030a o\u0308\u0304 ﬁne ﬀ \ufb03",
    "日本語のテキスト、中文文本。한국어 텍스트 ｆｕｌｌｗｉｄｔｈ ｶﾅ ガ か\u3099",
    "עברית مرحبا بالعالم हिन्दी ไทย Ελληνικά Русский",
    "😀 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 \U0001f9ff",
    "zero\u200bwidth soft\u00adhyphen no\u00a0break em\u2003space \u3000ideographic \ufeffbom line\u2028sep",
    "nul\x00 bell\x07 escape\x1b[0m delete\x7f nel\x85 private\ue000 \U0010ffff",
    "▁ literal ▁▁ escape ▁",
    "A longer text, so that many merges compete for the same characters. " * 40,
]


# --------------------------------------------------------------------------------------------------------------- LLaMA


def load_llama_tokenizer(model_args, training_args) -> PreTrainedTokenizerBase:
    """The tokenizer of a LLaMA-family model, equal to SentencePiece wherever the model has a `tokenizer.model`.

    BOS as the model's own tokenizer puts it, never an EOS, pad = unk (else EOS), padding on the right. The attribute
    `sentencepiece_model` is the path of the reference that `compare_with_sentencepiece` uses, or None.

    Raises UserError when there is no tokenizer, when it has no EOS, or when it cannot be made equal to SentencePiece.
    """
    model_file, json_file = (_find_file(model_args, name) for name in ("tokenizer.model", "tokenizer.json"))
    proto = _read_sentencepiece(model_file) if model_file else None
    if json_file:
        tokenizer = _load_published(model_args)
        if model_file and proto:
            tokenizer = _reconcile(tokenizer, proto, model_file, model_args)
    elif proto:
        tokenizer = _wrap_sentencepiece(proto, model_args, None)
        say(f"tokenizer: built from {model_file}")
    elif model_file:
        raise UserError(
            f"{model_file}: not a SentencePiece model, and there is no tokenizer.json beside it. Download it again, or add tokenizer.json."
        )
    else:
        raise UserError(
            f"{model_args.model_name_or_path}: neither tokenizer.json nor tokenizer.model is there. "
            "Name a folder or a hub repository that holds the model together with its tokenizer."
        )
    tokenizer.sentencepiece_model = model_file if proto else None
    _finish(tokenizer, model_args, training_args)
    if proto:
        compare_with_sentencepiece(tokenizer, PROBES)
        say(f"tokenizer: equals SentencePiece on {len(PROBES)} probe texts")
    return tokenizer


def _reconcile(published: PreTrainedTokenizerBase, proto, model_file: str, model_args) -> PreTrainedTokenizerBase:
    """The published tokenizer.json if it equals the SentencePiece model beside it, else that model converted here.

    Pre-training used SentencePiece; a tokenizer.json was converted from it later, often wrongly. What the folder adds to it is kept.
    """
    vocab = published.get_vocab()
    other = [(i, p.piece) for i, p in enumerate(proto.pieces) if p.type == p.NORMAL and vocab.get(p.piece) != i]
    if other:
        i, piece = other[0]
        raise UserError(
            f"{model_file} and the tokenizer.json beside it are different vocabularies: {len(other)} pieces have other ids, for example {piece!r}, "
            f"{i} in tokenizer.model and {vocab.get(piece)} in tokenizer.json. Keep the file that the model was trained with and remove the other."
        )
    differences = _differences(published, model_file, PROBES)
    if not differences:
        return published
    say(
        f"tokenizer: tokenizer.json differs from tokenizer.model on {len(differences)} of {len(PROBES)} probe texts; training and the saved "
        f"model use tokenizer.model's ids, those of pre-training. First difference: {_show_difference(*differences[0])}"
    )
    return _wrap_sentencepiece(proto, model_args, published)


def compare_with_sentencepiece(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> None:
    """Raise UserError with an example if any text's ids differ from SentencePiece's (`tokenizer.sentencepiece_model`)."""
    differences = _differences(tokenizer, tokenizer.sentencepiece_model, texts)
    if differences:
        raise UserError(
            f"tokenizer: {len(differences)} of {len(texts)} texts get other ids than SentencePiece gives them with {tokenizer.sentencepiece_model}, "
            f"which the model was pre-trained with. First: {_show_difference(*differences[0])}. Remove or rewrite such rows, or, if this model was really "
            "trained with another tokenizer, supply that one's tokenizer.json and take tokenizer.model out of the folder."
        )


def _differences(tokenizer, model_file: str, texts: list[str]) -> list[tuple[str, list[int], list[int]]]:
    """(text, ids, SentencePiece's ids) for each text whose ids differ."""
    ours = [ids.tolist() for ids in _encode(tokenizer, "prompt", texts, add_special_tokens=False)]
    reference = sentencepiece.SentencePieceProcessor(model_file=model_file).encode(texts)
    return [(text, a, b) for text, a, b in zip(texts, ours, reference, strict=True) if a != b]


def _show_difference(text: str, ours: list[int], reference: list[int]) -> str:
    first = next(
        (i for i, (a, b) in enumerate(zip(ours, reference, strict=False)) if a != b), min(len(ours), len(reference))
    )
    window = slice(max(0, first - 2), first + 6)
    shown = text if len(text) <= 120 else text[:120] + "…"
    return f"{shown!r} from token {first}: {ours[window]}, SentencePiece {reference[window]}"


def _read_sentencepiece(path: str):
    """The parsed model, or None if the file is no SentencePiece model (Llama 3 publishes a tiktoken file by that name)."""
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # protobuf makes it on import
    with open(path, "rb") as file:
        try:
            proto.ParseFromString(file.read())
        except DecodeError:
            return None
    if not proto.pieces:
        return None
    spec = proto.trainer_spec
    if spec.model_type != spec.BPE:
        kind = spec.ModelType.Name(spec.model_type)
        raise UserError(
            f"{path}: a SentencePiece model of type {kind}; LLaMA's are of type BPE, and only these are converted here."
        )
    return proto


def _sentencepiece_backend(proto) -> Tokenizer:
    """The SentencePiece model as a `tokenizers` pipeline that gives the same ids for every text.

    Two steps of SentencePiece's Normalizer decide the details (normalizer.cc): the dummy prefix goes before whatever the text
    begins with, a space included; with remove_extra_whitespaces, runs of spaces become one and those at the ends none.
    """
    pieces, spec = proto.pieces, proto.normalizer_spec
    vocab = {piece.piece: i for i, piece in enumerate(pieces)}
    # Only these are ever made by merging (bpe_model.cc looks up no control, unknown or byte piece).
    scores = {piece.piece: piece.score for piece in pieces if piece.type in (piece.NORMAL, piece.UNUSED)}
    user_defined = [piece.piece for piece in pieces if piece.type == piece.USER_DEFINED]
    backend = Tokenizer(
        BPE(
            vocab=vocab,
            merges=generate_merges(vocab, scores, skip_tokens=vocab.keys() - scores.keys()),
            unk_token=pieces[proto.trainer_spec.unk_id].piece,
            fuse_unk=True,
            byte_fallback=proto.trainer_spec.byte_fallback,
            ignore_merges=bool(user_defined),
        )
    )
    steps: list = []
    if spec.precompiled_charsmap:
        # Precompiled looks up a grapheme at a time and takes the shortest match (tokenizers 0.23): a decomposed Vietnamese letter
        # would lose its tone, Korean would stay in jamo, and CR LF would be one space. So nothing that is one grapheme is left in parts.
        if "nfkc" in spec.name:
            steps.append(normalizers.NFC())
        if "nmt" in spec.name:
            steps.append(normalizers.Replace("\r", "\n"))  # each is a space in nmt_nfkc
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(RUN_OF_SPACES), " "), normalizers.Replace(Regex(LAST_SPACES), "")]
        if not spec.add_dummy_prefix:
            steps.append(normalizers.Replace(Regex(LEADING_SPACE), ""))
    else:
        # Escaped this early, a first space is no reason for the Metaspace below to leave out the prefix.
        steps.append(normalizers.Replace(" ", SPACE))
    backend.normalizer = normalizers.Sequence(steps)

    # Metaspace leaves out the prefix where the text begins with its replacement: with a space as replacement that is the text whose
    # first space is to become the prefix. The second Metaspace writes every space as SentencePiece does.
    splits: list = [pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="never", split=False)]
    if spec.add_dummy_prefix:
        splits.insert(0, pre_tokenizers.Metaspace(replacement=" ", prepend_scheme="first", split=False))
    if user_defined:
        # Each is one token whatever surrounds it (ignore_merges above), and the longest one wins.
        longest_first = sorted(user_defined, key=len, reverse=True)
        splits.append(pre_tokenizers.Split(Regex("|".join(map(_escape_regex, longest_first))), behavior="isolated"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(splits)
    cleaning: list = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if spec.add_dummy_prefix:
        cleaning.append(decoders.Strip(content=" ", left=1, right=0))
    backend.decoder = decoders.Sequence(cleaning)
    return backend


def _escape_regex(text: str) -> str:
    return "".join(f"\\x{{{ord(character):x}}}" for character in text)


def _wrap_sentencepiece(proto, model_args, published: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerFast:
    """The converted model with the special tokens, added tokens, chat template and BOS rule that the folder declares."""
    config = get_tokenizer_config(model_args.model_name_or_path, cache_dir=model_args.cache_dir)
    backend = _sentencepiece_backend(proto)
    spec = proto.trainer_spec
    piece_of = {"unk_token": spec.unk_id, "bos_token": spec.bos_id, "eos_token": spec.eos_id}
    special = {name: proto.pieces[i].piece for name, i in piece_of.items() if 0 <= i < len(proto.pieces)}
    control = [piece.piece for piece in proto.pieces if piece.type in (piece.CONTROL, piece.UNKNOWN)]
    backend.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in control])

    added = _added_tokens(model_args, config, published, len(proto.pieces))
    for i, token in sorted(added.items()):
        backend.add_special_tokens([token]) if token.special else backend.add_tokens([token])
        if backend.token_to_id(token.content) != i:
            raise UserError(
                f"{model_args.model_name_or_path}: the added token {token.content!r} should have id {i}, but ids after tokenizer.model's "
                f"{len(proto.pieces)} are given in order and it would get {backend.token_to_id(token.content)}. Mend added_tokens.json or tokenizer_config.json."
            )
    for name in special:
        declared = published.special_tokens_map.get(name) if published is not None else config.get(name)
        declared = declared["content"] if isinstance(declared, dict) else declared
        if declared and backend.token_to_id(declared) is not None:  # LLaMA's first conversions declare them as ""
            special[name] = declared
    if config.get("add_bos_token", True) is not False and "bos_token" in special:
        bos = special["bos_token"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        clean_up_tokenization_spaces=False,
        chat_template=published.chat_template if published is not None else config.get("chat_template"),
        **special,
    )


def _added_tokens(
    model_args, config: dict, published: PreTrainedTokenizerBase | None, first_id: int
) -> dict[int, AddedToken]:
    """Tokens that the folder adds after tokenizer.model's pieces, by id."""
    if published is not None:
        return {i: token for i, token in published.added_tokens_decoder.items() if i >= first_id}
    added = {}
    path = _find_file(model_args, "added_tokens.json")
    if path:
        with open(path, encoding="utf-8") as file:
            added = {i: AddedToken(text, normalized=False, special=False) for text, i in json.load(file).items()}
    for i, fields in config.get("added_tokens_decoder", {}).items():
        added[int(i)] = AddedToken(**{key: value for key, value in fields.items() if key != "__type"})
    return {i: token for i, token in added.items() if i >= first_id}


# ---------------------------------------------------------------------------------------------------------------- XGen

XGEN_EOS, XGEN_EOS_ID, XGEN_VOCABULARY = "<|endoftext|>", 50256, 51200
TIKTOKEN_PATIENCE_S = 60  # it downloads 1.5 MB, once
_FIM = (
    "<fim_prefix> <fim_middle> <fim_suffix> <fim_pad> <filename> <gh_stars> <issue_start> <issue_comment> <issue_closed> "
    "<jupyter_start> <jupyter_text> <jupyter_code> <jupyter_output> <empty_output> <commit_before> <commit_msg> <commit_after> <reponame>"
).split()


def load_xgen_tokenizer(model_args, training_args) -> PreTrainedTokenizerBase:
    """XGen's tokenizer as a fast one, without remote code: GPT-2's BPE, runs of spaces and tabs, and tags.

    A `tokenizer.json` in the model's folder (an export of this project) is used after its ids are checked. No BOS, pad = EOS =
    `<|endoftext|>` (50256), padding on the right.

    Raises UserError when GPT-2's files can be had neither from tiktoken nor from --gpt2_files, or when ids are not XGen's.
    """
    if _find_file(model_args, "tokenizer.json"):
        tokenizer = _load_published(model_args)
        _check_xgen(tokenizer, f"{model_args.model_name_or_path}/tokenizer.json")
    else:
        ranks = _ranks_from_files(model_args.gpt2_files) if model_args.gpt2_files else _ranks_from_tiktoken()
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=_xgen_backend(ranks), eos_token=XGEN_EOS, clean_up_tokenization_spaces=False
        )
        _check_xgen(tokenizer, "the tokenizer built from GPT-2's files")
    tokenizer.sentencepiece_model = None
    _finish(tokenizer, model_args, training_args)
    return tokenizer


def xgen_extra_tokens() -> tuple[dict[bytes, int], dict[str, int]]:
    """(runs of spaces and tabs, which merge like any BPE token; tags), each with its id, as XGen's published code adds them to GPT-2."""
    runs = [b" " * n for n in range(31, 1, -1)] + [b"\t" * n for n in range(9, 1, -1)]
    first = XGEN_EOS_ID + 1
    tags = [*_FIM, *(f"<dummy_{i}>" for i in range(4)), "<sep>", "<eom>"]
    tags += [f"<mask_{i}>" for i in range(XGEN_VOCABULARY - first - len(runs) - len(tags), 0, -1)]
    return (
        {run: first + i for i, run in enumerate(runs)},
        {XGEN_EOS: XGEN_EOS_ID} | {tag: first + len(runs) + i for i, tag in enumerate(tags)},
    )


def _xgen_backend(ranks: dict[bytes, int]) -> Tokenizer:
    """GPT-2's mergeable ranks with XGen's additions, as a `tokenizers` pipeline."""
    runs, tags = xgen_extra_tokens()
    letters = bytes_to_unicode()
    vocab = {"".join(letters[byte] for byte in token): rank for token, rank in (ranks | runs).items()}
    # tiktoken merges any neighbours whose joint token has the lowest rank: every split of a token is a merge at its rank.
    backend = Tokenizer(BPE(vocab=vocab | tags, merges=generate_merges(vocab, None)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(tag, normalized=False, special=True) for tag in tags])
    return backend


def _ranks_from_tiktoken() -> dict[bytes, int]:
    import tiktoken

    result: list = []

    def download() -> None:
        try:
            result.append(tiktoken.get_encoding("gpt2"))
        except (OSError, ValueError) as error:  # requests' errors are OSErrors; a wrong hash is a ValueError
            result.append(error)

    # tiktoken 0.14 downloads without a time limit; a machine whose network swallows packets would wait for ever.
    thread = threading.Thread(target=download, daemon=True)
    thread.start()
    thread.join(timeout=TIKTOKEN_PATIENCE_S)
    outcome = result[0] if result else TimeoutError(f"no answer in {TIKTOKEN_PATIENCE_S} s")
    if isinstance(outcome, Exception):
        raise UserError(
            f"xgen tokenizer: tiktoken cannot get GPT-2's files ({type(outcome).__name__}: {str(outcome)[:200]}). On a machine without a network, copy GPT-2's "
            "vocab.json and merges.txt (hub repository openai-community/gpt2) into a folder and give it with --gpt2_files FOLDER, or set TIKTOKEN_CACHE_DIR "
            "to a copy of tiktoken's cache."
        )
    return dict(outcome._mergeable_ranks)


def _ranks_from_files(folder: str) -> dict[bytes, int]:
    """GPT-2's mergeable ranks from vocab.json, checked against merges.txt line by line."""
    try:
        with open(os.path.join(folder, "vocab.json"), encoding="utf-8") as file:
            vocab = json.load(file)
        with open(os.path.join(folder, "merges.txt"), encoding="utf-8") as file:
            merges = [line.rstrip("\n") for line in file if not line.startswith("#version") and line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(
            f"--gpt2_files {folder}: vocab.json and merges.txt cannot be read from it ({error})."
        ) from error
    ids = [vocab.get(merge.replace(" ", "")) for merge in merges]
    if vocab.pop(XGEN_EOS, None) != XGEN_EOS_ID or len(vocab) != XGEN_EOS_ID or ids != list(range(256, XGEN_EOS_ID)):
        raise UserError(
            f"--gpt2_files {folder}: not GPT-2's files. vocab.json must hold 50257 tokens with {XGEN_EOS} = 50256, and line i of merges.txt must make token 256 + i."
        )
    bytes_of = {letter: byte for byte, letter in bytes_to_unicode().items()}
    return {bytes(bytes_of[letter] for letter in token): rank for token, rank in vocab.items()}


def _check_xgen(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    runs, tags = xgen_extra_tokens()
    letters = bytes_to_unicode()
    expected = tags | {"".join(letters[byte] for byte in run): i for run, i in runs.items()}
    vocab = tokenizer.get_vocab()
    wrong = [(token, i) for token, i in expected.items() if vocab.get(token) != i]
    if wrong or sorted(vocab.values()) != list(range(XGEN_VOCABULARY)):
        detail = (
            f"{wrong[0][0]!r} has id {vocab.get(wrong[0][0])}, XGen's is {wrong[0][1]}"
            if wrong
            else f"it has {len(vocab)} tokens, XGen {XGEN_VOCABULARY}"
        )
        raise UserError(
            f"{where}: not XGen's tokenizer: {detail}. Use llama_training.py for a LLaMA model, or take tokenizer.json out of the folder so that XGen's is built."
        )


# --------------------------------------------------------------------------------------------------- both model families


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model_config) -> list[str]:
    """What is wrong between a tokenizer and the model it is to feed, known before weights load: one message for each problem."""
    problems = []
    eos_ids = model_config.eos_token_id
    eos_ids = eos_ids if isinstance(eos_ids, (list, tuple)) else [eos_ids]
    if eos_ids != [None] and tokenizer.eos_token_id not in eos_ids:
        problems.append(
            f"tokenizer: EOS {tokenizer.eos_token!r} is id {tokenizer.eos_token_id}, but the model's config.json says eos_token_id {model_config.eos_token_id}. "
            "A model trained so never stops. Mend eos_token_id in config.json, or eos_token in tokenizer_config.json."
        )
    outside = sorted((i, token) for token, i in tokenizer.get_vocab().items() if i >= model_config.vocab_size)
    if outside:
        named = ", ".join(f"{token!r} = {i}" for i, token in outside[:5]) + (", …" if len(outside) > 5 else "")
        problems.append(
            f"tokenizer: {len(outside)} tokens have ids outside the model's embedding of {model_config.vocab_size} rows ({named}). "
            "Use the tokenizer of this model, or take these tokens out of added_tokens.json and tokenizer.json."
        )
    return problems


def encode_prompts(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], *, allow_control_tokens: bool = False
) -> list[array]:
    """Ids of each text as generation will see it, with BOS where the tokenizer puts one.

    A control token's text inside a cell (`</s>`, `<|endoftext|>`) stays text unless `allow_control_tokens`.
    """
    if not tokenizer.is_fast:
        return [array("i", tokenizer(text, split_special_tokens=not allow_control_tokens).input_ids) for text in texts]
    return _encode(tokenizer, "prompt", texts, add_special_tokens=True, allow_control_tokens=allow_control_tokens)


def encode_responses(
    tokenizer: PreTrainedTokenizerBase, texts: list[str], *, allow_control_tokens: bool = False
) -> list[array]:
    """Ids of each text as the continuation of a prompt: no BOS, no dummy-prefix space, no EOS.

    Equal to `tokenizer(eos_token + text, add_special_tokens=False).input_ids[1:]` where the text holds no control token's text
    (proved on probes when the tokenizer is loaded); such a text stays text unless `allow_control_tokens`.
    """
    if not tokenizer.is_fast:
        return [array("i", _slow_continuation(tokenizer, text, allow_control_tokens)) for text in texts]
    return _encode(tokenizer, "response", texts, add_special_tokens=False, allow_control_tokens=allow_control_tokens)


def _encode(
    tokenizer, use: str, texts: list[str], *, add_special_tokens: bool, allow_control_tokens: bool = False
) -> list[array]:
    encoder = _encoder(tokenizer, use, allow_control_tokens)

    def encode_whole(texts: list[str]) -> list[array]:
        encodings = encoder.encode_batch_fast(texts, add_special_tokens=add_special_tokens)
        return [array("i", encoding.ids) for encoding in encodings]

    if "_sft_words" not in vars(tokenizer):
        tokenizer._sft_words = _Words(_encoder(tokenizer, "response", False))
    words = tokenizer._sft_words
    if allow_control_tokens or not words.stand_alone:
        return encode_whole(texts)
    return words.encode(texts, encode_whole, (use, add_special_tokens))


class _Words:
    """Texts encoded word by word, each different word once: nearly all words of a text stood in an earlier one.

        "the river runs" -> ids of "the" where a text begins, of "▁river", of "▁runs"

    For tokenizers like LLaMA's and Mistral's, whose words `stand_alone`: a BPE without a piece that has a space behind another
    character, so that no token spans two words, and before it no other step than that spaces become ▁, and a prefix.
    """

    MOST_KEPT = 2**17  # words, about 30 MB
    LONGEST = 16  # characters, on average; what is written without spaces (Chinese, base64) does not come again

    def __init__(self, encoder: Tokenizer):
        model, vocab = encoder.model, encoder.get_vocab(with_added_tokens=False)
        parts = [part for part in _parts_before_model(encoder).values() if part]
        steps = [step for part in parts for step in part.get("normalizers") or part.get("pretokenizers") or [part]]
        about_spaces = [{"String": " "}, {"Regex": RUN_OF_SPACES}, {"Regex": LAST_SPACES}]
        self.stand_alone = (
            isinstance(model, BPE)
            and not (
                model.dropout or model.ignore_merges or model.continuing_subword_prefix or model.end_of_word_suffix
            )
            and SPACE in vocab
            and not any(SPACE in piece.lstrip(SPACE) for piece in vocab)
            and all(
                token.special for token in encoder.get_added_tokens_decoder().values()
            )  # to this encoder they are text
            and any(SPACE in (step.get("content"), step.get("replacement")) for step in steps)
            and all(step["type"] == "Metaspace" or step.get("pattern") in about_spaces for step in steps)
        )
        self.encoder = encoder
        self.begins_word = np.zeros(max(vocab.values(), default=0) + 1, bool)  # by id
        self.begins_word[[i for piece, i in vocab.items() if piece.startswith(SPACE)]] = True
        self.ids: dict = {}  # int32 as bytes, of a word behind a space, and of (use, word) where a text begins

    def encode(self, texts: list[str], encode_whole: Callable[[list[str]], list[array]], use: tuple) -> list[array]:
        """Ids of each text: of words with one space between them as said above, of any other text by `encode_whole`."""
        rows = [self._split(text) for text in texts]
        if len(self.ids) > self.MOST_KEPT:
            self.ids = {}  # another thread may still be looking words up in the old one
        ids = self.ids
        if new := list(set(chain.from_iterable(rows)).difference(ids)):
            (encoding,) = self.encoder.encode_batch_fast([" " + " ".join(new)], add_special_tokens=False)
            new_ids = np.array(encoding.ids, np.int32)
            starts = np.flatnonzero(self.begins_word[new_ids]).tolist()
            ends = [*starts[1:], len(new_ids)]
            ids.update((word, new_ids[a:b].tobytes()) for word, a, b in zip(new, starts, ends, strict=True))
        if new_first := list({(use, words[0]) for words in rows if words}.difference(ids)):
            whole = encode_whole([word for _, word in new_first])
            ids.update((key, word_ids.tobytes()) for key, word_ids in zip(new_first, whole))
        others = iter(encode_whole([text for text, words in zip(texts, rows) if not words]))
        return [
            array("i", ids[use, words[0]] + b"".join(map(ids.__getitem__, words[1:]))) if words else next(others)
            for words in rows
        ]

    def _split(self, text: str) -> list[str]:
        words = text.split(" ")
        return words if "" not in words and SPACE not in text and len(text) <= self.LONGEST * len(words) else []


def _encoder(tokenizer: PreTrainedTokenizerBase, use: str, allow_control_tokens: bool) -> Tokenizer:
    """A copy of the tokenizer's backend for prompts or for responses, made once.

    A copy, because truncation, padding and encode_special_tokens are state of the backend, and calls of the tokenizer change it.
    """
    encoders = vars(tokenizer).setdefault("_sft_encoders", {})
    if (use, allow_control_tokens) not in encoders:
        backend = copy.deepcopy(tokenizer.backend_tokenizer)
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = not allow_control_tokens
        if use == "response":
            parts = {name: _without_prefix(part) for name, part in _parts_before_model(backend).items()}
            empty = Tokenizer.from_str(json.dumps(json.loads(Tokenizer(BPE()).to_str()) | parts))
            backend.normalizer, backend.pre_tokenizer = empty.normalizer, empty.pre_tokenizer
        encoders[use, allow_control_tokens] = backend
    return encoders[use, allow_control_tokens]


def _parts_before_model(backend: Tokenizer) -> dict[str, dict | None]:
    """Normalizer and pre-tokenizer as JSON, through that of a tokenizer without a vocabulary: they have no other public form."""
    empty = Tokenizer(BPE())
    if backend.normalizer is not None:
        empty.normalizer = backend.normalizer
    if backend.pre_tokenizer is not None:
        empty.pre_tokenizer = backend.pre_tokenizer
    state = json.loads(empty.to_str())
    return {name: state[name] for name in ("normalizer", "pre_tokenizer")}


def _without_prefix(part: dict | None) -> dict | None:
    """A normalizer or pre-tokenizer (its JSON) that puts no space before the text; None if nothing is left of it."""
    if part is None or part["type"] == "Prepend" or part.get("pattern") == {"Regex": LEADING_SPACE}:
        return None
    if part["type"] == "Sequence":
        key = "normalizers" if "normalizers" in part else "pretokenizers"
        return part | {key: [kept for kept in map(_without_prefix, part[key]) if kept is not None]}
    if part["type"] == "Metaspace":
        return part | {"prepend_scheme": "never"}
    if part["type"] == "ByteLevel":
        return part | {"add_prefix_space": False}
    return part


def _find_file(model_args, name: str) -> str | None:
    """Local path of a file of the model (downloaded and cached when the model is a hub repository), or None if it has none."""
    try:
        return cached_file(
            model_args.model_name_or_path,
            name,
            cache_dir=model_args.cache_dir,
            _raise_exceptions_for_missing_entries=False,
        )
    except OSError as error:
        raise UserError(f"--model_name_or_path {model_args.model_name_or_path}: {error}") from error


def _load_published(model_args) -> PreTrainedTokenizerBase:
    """The tokenizer as plain transformers loads it from tokenizer.json."""
    try:
        return AutoTokenizer.from_pretrained(
            model_args.model_name_or_path,
            cache_dir=model_args.cache_dir,
            trust_remote_code=model_args.trust_remote_code,
        )
    except (OSError, ValueError) as error:
        raise UserError(f"{model_args.model_name_or_path}: transformers cannot load its tokenizer: {error}") from error


def _finish(tokenizer: PreTrainedTokenizerBase, model_args, training_args) -> None:
    """EOS there and not added by itself, pad, padding side, length; and the ids of prompts and responses proved on this very tokenizer."""
    where = model_args.model_name_or_path
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{where}: the tokenizer has no EOS token, so a response could not be ended. Name one as eos_token in tokenizer_config.json."
        )
    ids = tokenizer("a").input_ids
    if ids[-1] == tokenizer.eos_token_id:
        # `add_eos_token = False` rebuilds the template from flags that may have lost BOS (transformers 5.23): keep what was there.
        bos_first = tokenizer.bos_token_id is not None and ids[0] == tokenizer.bos_token_id
        tokenizer.add_eos_token = False
        tokenizer.add_bos_token = bos_first
        for copied in ("_sft_encoders", "_sft_words"):  # by a comparison with SentencePiece, while EOS was added
            vars(tokenizer).pop(copied, None)
        say("tokenizer: it added EOS to every text; that is off, because a prompt does not end there")
    if tokenizer.unk_token_id is not None:
        tokenizer.pad_token = tokenizer.unk_token
    else:
        tokenizer.pad_token = tokenizer.eos_token
    say(f"tokenizer: pad is {tokenizer.pad_token!r} ({tokenizer.pad_token_id}); padding is never trained on")
    tokenizer.padding_side = tokenizer.truncation_side = "right"
    tokenizer.model_max_length = int(1e30)  # transformers' own "no limit": the probes are not to be warned about
    _prove_ids(tokenizer)
    tokenizer.model_max_length = training_args.model_max_length


def _after(tokenizer: PreTrainedTokenizerBase, anchor: str, text: str, **options) -> list[int] | None:
    """The ids of `text` after `anchor`, or None if a token spans the two."""
    before, joint = (tokenizer(part, add_special_tokens=False, **options).input_ids for part in (anchor, anchor + text))
    return joint[len(before) :] if joint[: len(before)] == before else None


def _slow_continuation(tokenizer: PreTrainedTokenizerBase, text: str, allow_control_tokens: bool) -> list[int]:
    """The continuation by a tokenizer without a backend: what follows EOS, or a line end where control tokens must stay text."""
    literal = not allow_control_tokens and any(token in text for token in tokenizer.all_special_tokens)
    ids = _after(tokenizer, "\n" if literal else tokenizer.eos_token, text, split_special_tokens=literal)
    if ids is None:
        raise UserError(
            f"tokenizer: {text[:80]!r} merges with what comes before it, so its ids as a response are not defined. Use a fast tokenizer."
        )
    return ids


def _prove_ids(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError unless prompts get the tokenizer's own ids, and responses those that follow EOS, on every probe.

    A line end in place of EOS proves it too: older LLaMA pipelines put their prefix space after every control token.
    """
    plain = [text for text in PROBES if not any(token in text for token in tokenizer.all_special_tokens)]
    for text, prompt_ids, response_ids in zip(
        plain, encode_prompts(tokenizer, plain), encode_responses(tokenizer, plain), strict=True
    ):
        if prompt_ids.tolist() != tokenizer(text).input_ids:
            raise UserError(
                f"tokenizer: the prompt {text[:80]!r} gets {prompt_ids[:8]}…, but generation gives {tokenizer(text).input_ids[:8]}…. Report this model."
            )
        if all(_after(tokenizer, anchor, text) != response_ids.tolist() for anchor in (tokenizer.eos_token, "\n")):
            raise UserError(
                f"tokenizer: the response {text[:80]!r} gets {response_ids[:8]}…, but after EOS it is {(_after(tokenizer, tokenizer.eos_token, text) or [])[:8]}…. "
                "Report this model."
            )

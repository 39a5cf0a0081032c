"""Load a LLaMA tokenizer that equals SentencePiece.

transformers 5.23 converts a folder that has only `tokenizer.model` wrongly: it orders merges by id instead of by piece score, and
drops the normalizer. Here the conversion is right, and compared with SentencePiece on the user's own rows.
"""

import json
import math
from pathlib import Path

import sentencepiece
from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import generate_merges
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from sft.data import encode
from sft.data import tokenizer_files as files
from sft.data.word_cache import LAST_SPACES, LEADING_SPACE, RUN_OF_SPACES, SPACE
from sft.job import UserError, say

MADE_FROM_MERGES = "made from tokenizer.json"  # notes it in a tokenizer.model that exports have for llama.cpp alone


def load_llama_tokenizer(model_args) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a LLaMA-family model: ids equal to SentencePiece's wherever the model has a `tokenizer.model`, else to its file's.

    BOS as the model's own tokenizer puts it, never an EOS, pad = unk (else EOS). `reference` is what the ids are compared with.
    """
    model_file, json_file = (files.find_file(model_args, name) for name in ("tokenizer.model", "tokenizer.json"))
    proto = _read_sentencepiece(model_file) if model_file else None
    if json_file:
        tokenizer = files.load_published(model_args)
        if model_file and proto:
            tokenizer = _reconcile(tokenizer, proto, model_file, model_args)
    elif proto:
        tokenizer = _wrap_sentencepiece(proto, model_args, None)
        say(f"tokenizer: built from {model_file}")
    else:
        found = "tokenizer.model is not a SentencePiece model, and tokenizer.json is not there"
        raise UserError(
            f"{model_args.model_name_or_path}: {found if model_file else 'neither tokenizer.json nor tokenizer.model is there'}. "
            "Name a folder or a hub repository that holds the model together with its tokenizer."
        )
    if proto:
        tokenizer.reference = _reference(model_file, proto)
    files.finish(tokenizer, model_args)
    if proto:
        bos = proto.trainer_spec.bos_id
        if bos >= 0 and not files.added_around(tokenizer)[0]:
            declared = "tokenizer.json has none" if json_file else "tokenizer_config.json says add_bos_token false"
            say(
                f"tokenizer: no BOS before a prompt, {declared}; SentencePiece's is {proto.pieces[bos].piece!r} ({bos})"
            )
        say(f"tokenizer: equals SentencePiece on {len(encode.PROBES)} probe texts")
    return tokenizer


def _reconcile(published: PreTrainedTokenizerBase, proto, model_file: str, model_args) -> PreTrainedTokenizerBase:
    """The published tokenizer.json if it equals the SentencePiece model next to it, else that model converted here.

    Pre-training used SentencePiece; a tokenizer.json was converted from it later, often wrongly. What the folder adds to it is kept.
    """
    vocab = published.get_vocab()
    other = [(i, p.piece) for i, p in enumerate(proto.pieces) if p.type == p.NORMAL and vocab.get(p.piece) != i]
    if other:
        i, piece = other[0]
        raise UserError(
            f"{model_file} and the tokenizer.json next to it are different vocabularies: {len(other)} pieces have other ids, for example {piece!r}, "
            f"{i} in tokenizer.model and {vocab.get(piece)} in tokenizer.json. Keep the file that the model was trained with and remove the other."
        )
    published.reference = _reference(model_file, proto)
    wrong = encode.differences(published, encode.PROBES)
    if not wrong:
        return published
    say(
        f"tokenizer: tokenizer.json differs from tokenizer.model on {len(wrong)} of {len(encode.PROBES)} probe texts; training and the saved "
        f"model use tokenizer.model's ids, those of pre-training. First difference: {wrong[0]}"
    )
    return _wrap_sentencepiece(proto, model_args, published)


def _reference(path: str, proto) -> files.Reference:
    """SentencePiece itself. Where it changes the texts first, any row may hold a character that is changed otherwise here."""
    rows = math.inf if proto.normalizer_spec.precompiled_charsmap else files.ROWS_COMPARED["SentencePiece"]
    cure = (
        "Remove or rewrite such rows, or, if this model was really trained with another tokenizer, supply that one's tokenizer.json and take "
        "tokenizer.model out of the folder."
    )
    encode_texts = sentencepiece.SentencePieceProcessor(model_file=path).encode
    return files.Reference("SentencePiece", path, encode_texts, rows, cure)


def _read_sentencepiece(path: str):
    """The parsed model; None if the file is none (Llama 3 publishes a tiktoken file by that name), or one that an export made."""
    proto = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # protobuf makes it on import
    try:
        proto.ParseFromString(Path(path).read_bytes())
    except DecodeError:
        return None
    spec = proto.trainer_spec
    if spec.model_prefix == MADE_FROM_MERGES:
        return None
    if proto.pieces and spec.model_type != spec.BPE:
        kind = spec.ModelType.Name(spec.model_type)
        raise UserError(
            f"{path}: a SentencePiece model of type {kind}; LLaMA's are of type BPE, and only these are converted here."
        )
    return proto if proto.pieces else None


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
    merges = generate_merges(vocab, scores, skip_tokens=vocab.keys() - scores.keys())
    unk, byte_fallback = pieces[proto.trainer_spec.unk_id].piece, proto.trainer_spec.byte_fallback
    options = {"fuse_unk": True, "byte_fallback": byte_fallback, "ignore_merges": bool(user_defined)}
    backend = Tokenizer(BPE(vocab=vocab, merges=merges, unk_token=unk, **options))
    steps: list = []
    if spec.precompiled_charsmap:
        # Precompiled looks up a grapheme at a time and takes the shortest match (tokenizers 0.23): a decomposed Vietnamese letter
        # would lose its tone, Korean would stay in jamo, and CR LF would be one space. So nothing that is one grapheme is left in parts.
        steps += [normalizers.NFC()] if "nfkc" in spec.name else []
        steps += [normalizers.Replace("\r", "\n")] if "nmt" in spec.name else []  # each is a space in nmt_nfkc
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(RUN_OF_SPACES), " "), normalizers.Replace(Regex(LAST_SPACES), "")]
        steps += [] if spec.add_dummy_prefix else [normalizers.Replace(Regex(LEADING_SPACE), "")]
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
        escaped = ("".join(f"\\x{{{ord(character):x}}}" for character in text) for text in longest_first)
        splits.append(pre_tokenizers.Split(Regex("|".join(escaped)), behavior="isolated"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(splits)
    strip = [decoders.Strip(content=" ", left=1, right=0)] if spec.add_dummy_prefix else []
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return backend


def _wrap_sentencepiece(proto, model_args, published: PreTrainedTokenizerBase | None) -> PreTrainedTokenizerFast:
    """The converted model with the special tokens, added tokens, chat template and BOS that the folder declares."""
    pieces, spec = proto.pieces, proto.trainer_spec
    config = get_tokenizer_config(model_args.model_name_or_path, cache_dir=model_args.cache_dir)
    if published is not None:
        config |= files.settings_of(published)
        added = published.added_tokens_decoder
    else:
        path = files.find_file(model_args, "added_tokens.json")
        ids = json.loads(Path(path).read_text(encoding="utf-8")) if path else {}
        # SentencePiece knows none of them: inside a cell they are text, as its own control tokens are
        added = {i: AddedToken(text, normalized=False, special=True) for text, i in ids.items()}
        for i, fields in config.get("added_tokens_decoder", {}).items():
            added[int(i)] = AddedToken(**{key: value for key, value in fields.items() if key != "__type"})
    backend = _sentencepiece_backend(proto)
    control = [piece.piece for piece in pieces if piece.type in (piece.CONTROL, piece.UNKNOWN)]
    backend.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in control])
    for i, token in sorted((i, token) for i, token in added.items() if i >= len(pieces)):
        backend.add_special_tokens([token]) if token.special else backend.add_tokens([token])
        if backend.token_to_id(token.content) != i:
            raise UserError(
                f"{model_args.model_name_or_path}: the added token {token.content!r} should have id {i}, but ids after tokenizer.model's "
                f"{len(pieces)} are given in order and it would get {backend.token_to_id(token.content)}. Fix added_tokens.json or tokenizer_config.json."
            )
    special = {}
    for name, i in (("unk_token", spec.unk_id), ("bos_token", spec.bos_id), ("eos_token", spec.eos_id)):
        declared = config.get(name)
        declared = declared["content"] if isinstance(declared, dict) else declared
        known = declared and backend.token_to_id(declared) is not None  # LLaMA's first conversions declare them as ""
        if 0 <= i < len(pieces):
            special[name] = declared if known else pieces[i].piece
    if published is not None:
        before, _ = files.added_around(published)
    else:
        before = _bos_of_the_model(model_args, backend, special.get("bos_token"), spec.bos_id)
        if config.get("add_bos_token", True) is False:
            before = []
    backend.post_processor = files.putting_before(backend, before)
    kept = {name: config.get(name) for name in ("chat_template", "model_max_length", "padding_side", "truncation_side")}
    tokenizer = files.in_plain_class(backend, kept | special)
    if published is not None:
        files.prove_reload(tokenizer, model_args)
    return tokenizer


def _bos_of_the_model(model_args, backend: Tokenizer, declared: str | None, sentencepieces: int) -> list[int]:
    """The BOS of a folder without tokenizer.json: SentencePiece's, unless config.json has the one that tokenizer_config.json declares."""
    path = files.find_file(model_args, "config.json")
    models = json.loads(Path(path).read_text(encoding="utf-8")).get("bos_token_id") if path else None
    if declared is None:
        return []
    return [models] if models == backend.token_to_id(declared) else [sentencepieces]

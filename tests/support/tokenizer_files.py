"""Tokenizer files and texts that tests make for themselves: SentencePiece models, and a BPE of GPT-2's form and size."""

import io
import itertools
import json
import random
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers.convert_slow_tokenizer import bytes_to_unicode


def make_texts(count: int = 600, seed: int = 7) -> list[str]:
    """Texts of several kinds (prose with double spaces, code, lists, numbers, other scripts), always the same ones."""
    rng = random.Random(seed)
    nouns = (
        "river baker engine garden letter mountain window teacher market winter planet violin harbour kitchen".split()
    )
    verbs = "carries finds paints repairs remembers follows measures opens crosses describes builds sells".split()
    # Invented words, so that there are merges enough to learn and to compete.
    heads, tails = (
        "br cl d fl gr h k l m n pr qu s st t tr v w".split(),
        "an er ight ou ing ack ell ome ist ure ay ond".split(),
    )
    nouns += ["".join(rng.choice(heads) + rng.choice(tails) for _ in range(rng.randint(1, 3))) for _ in range(400)]
    others = "slowly quietly twice again tomorrow yesterday without thinking before breakfast in the rain".split()
    foreign = [
        "el perro come pan",
        "une étoile brille",
        "der Bäcker öffnet früh",
        "Москва и река",
        "日本の庭",
        "물과 불",
        "שלום עולם",
        "x² + y²",
    ]

    def sentence() -> str:
        words = [
            "The",
            rng.choice(nouns),
            rng.choice(verbs),
            "the",
            rng.choice(nouns),
            *rng.sample(others, rng.randint(0, 3)),
        ]
        return " ".join(words) + rng.choice([".", "!", "?", ";", "..."])

    def prose() -> str:
        return rng.choice([" ", "  ", "\n", "\n\n"]).join(sentence() for _ in range(rng.randint(1, 6)))

    def code() -> str:
        indent = rng.choice(["    ", "\t", "  "])
        lines = [f"def {rng.choice(verbs)}_{rng.choice(nouns)}({rng.choice(nouns)}, n={rng.randint(0, 99)}):"]
        lines += [
            f"{indent}if n >= {rng.randint(0, 9)}:  # {sentence()}",
            f"{indent * 2}return [{rng.choice(nouns)}[i] for i in range(n)]",
        ]
        return "\n".join([*lines, "", f'print(f"{{{rng.choice(nouns)}!r}}")  //  {rng.random():.4f}'])

    def listing() -> str:
        gaps = [" ", "\t", "  "]
        return "\n".join(
            f"{i}.{rng.choice(gaps)}{rng.choice(nouns)}:{rng.choice(gaps)}{rng.randint(0, 10**6):,}"
            for i in range(1, rng.randint(3, 7))
        )

    def other_script() -> str:
        return f"{sentence()} {rng.choice(foreign)}  {rng.choice(['😀', '½', 'ﬁ', '①', '…', '—', chr(0xA0)])} {rng.choice(foreign)}"

    kinds, edges = [prose, prose, code, listing, other_script], ["", "", "", " ", "  ", "\t "]
    return [rng.choice(edges) + rng.choice(kinds)() + rng.choice(edges) for _ in range(count)]


def train_sentencepiece(folder: Path, **spec) -> Path:
    """Train a LLaMA-like SentencePiece BPE (byte fallback, split digits) on `make_texts` and write folder/tokenizer.model."""
    settings = {
        "model_type": "bpe",
        "vocab_size": 700,
        "byte_fallback": True,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "minloglevel": 2,
    }
    lines = [line for text in make_texts(1500, seed=1) for line in text.split("\n") if line.strip()]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=model, **(settings | spec))
    proto = sentencepiece_model_pb2.ModelProto.FromString(model.getvalue())
    for piece in proto.pieces:
        if set(piece.piece) == {"▁"}:
            piece.score = (
                -1e9
            )  # as in LLaMA's and Mistral's files, where a run of spaces has an early id and is merged last
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    return folder / "tokenizer.model"


def write_gpt2_files(folder: Path) -> Path:
    """Write vocab.json and merges.txt of GPT-2's form and size: 256 bytes, 50,000 merges, `<|endoftext|>` = 50256.

    The first merges are learnt from `make_texts`, the rest are pairs of bytes; like GPT-2's own, none is a run of spaces or tabs.
    """
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=1500, initial_alphabet=list(bytes_to_unicode().values()), show_progress=False
    )
    trained.train_from_iterator(make_texts(1500, seed=1), trainer)
    learnt = [tuple(merge) for merge in json.loads(trained.to_str())["model"]["merges"]]

    letters = list(bytes_to_unicode().values())  # GPT-2 numbers its bytes in this order
    blanks = {bytes_to_unicode()[ord(" ")], bytes_to_unicode()[ord("\t")]}
    vocab = {letter: i for i, letter in enumerate(letters)}
    merges: list[str] = []
    for left, right in itertools.chain(learnt, itertools.product(letters, letters)):
        known = left in vocab and right in vocab and left + right not in vocab
        if known and len(merges) < 50_000 and not set(left + right) <= blanks:
            vocab[left + right] = 256 + len(merges)
            merges.append(f"{left} {right}")
    assert len(merges) == 50_000
    vocab["<|endoftext|>"] = 50_256
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    return folder

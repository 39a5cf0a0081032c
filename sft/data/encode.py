"""Make the token ids of prompts and responses, as generation will see them, and prove them on the tokenizer at hand."""

import copy
import functools
import json
import re
from array import array
from itertools import islice

from tokenizers import Tokenizer
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase

from sft.data.csv_rows import quoted
from sft.data.word_cache import LEADING_SPACE, Words, parts_before_model
from sft.job import UserError

# What tokenizers have been seen to differ on: runs of spaces, edges, line ends, code, marks, scripts, control texts, length.
PROBES = [
    "The quick brown fox jumps over the lazy dog.",
    "cheese.  Rick said:   three,    four, and a run of" + " " * 40 + "forty.", " one space first",
    "   three spaces first", "one space last ", "three spaces last   ", "   ", "tab\tand\t\ttwo tabs\t", "\tfirst",
    "line\nline\n\nblank line\r\nwindows\r", "\n\n\nfirst", " \n \n ",
    "def f(x):\n    if x > 0:\n        return {'a': [1, 2, 3]}  # why?\n\n\tprint(f\"{x!r:>10}\")\n",
    "for (int i = 0; i < n; ++i) { a[i] += b[i] & 0xFF; } // https://example.org/a?b=c&d=%20",
    '<p class="x">1 &lt; 2</p></s><s><unk><pad>[INST] <|endoftext|> <0x0A>',
    "3.14159 1,000,000 12345678901234567890 1e-9 ½ ² ①\n\n1. one\n\n2. two\n10. ten",
    "don't WON'T they're we'll I'd o'clock aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "naïve café Ångström e\u0301 A\u030a o\u0308\u0304 ﬁne ﬀ \ufb03", "日本語のテキスト、中文文本。한국어 텍스트 ｆｕｌｌｗｉｄｔｈ ｶﾅ ガ か\u3099",
    "עברית مرحبا بالعالم हिन्दी ไทย Ελληνικά Русский", "😀 👩‍👩‍👧‍👦 🏳️‍🌈 👍🏽 \U0001f9ff",
    "zero\u200bwidth soft\u00adhyphen no\u00a0break em\u2003space \u3000ideographic \ufeffbom line\u2028sep",
    "nul\x00 bell\x07 escape\x1b[0m delete\x7f nel\x85 private\ue000 \U0010ffff", "▁ literal ▁▁ escape ▁",
    "A longer text, so that many merges compete for the same characters. " * 40,
]  # fmt: skip


def encode_prompts(tokenizer, texts: list[str], *, allow_control_tokens: bool = False) -> list[array]:
    """Ids of each text as generation will see it, with BOS where the tokenizer puts one.

    A control token's text inside a cell (`</s>`, `<|endoftext|>`) stays text unless `allow_control_tokens`; in responses too.
    """
    if not tokenizer.is_fast:
        return [array("i", tokenizer(text, split_special_tokens=not allow_control_tokens).input_ids) for text in texts]
    return encode(tokenizer, "prompt", texts, True, allow_control_tokens)


def encode_responses(tokenizer, texts: list[str], *, allow_control_tokens: bool = False) -> list[array]:
    """Ids of each text as the continuation of a prompt: no BOS, no dummy-prefix space, no EOS.

    Equal to `tokenizer(eos_token + text, add_special_tokens=False).input_ids[1:]`, which is proved on probes at loading.
    """
    if not tokenizer.is_fast:
        return [_slow_continuation(tokenizer, text, allow_control_tokens) for text in texts]
    return encode(tokenizer, "response", texts, False, allow_control_tokens)


GUARD = "\ufdd0"  # a noncharacter of Unicode, never in a text: it marks the texts of control tokens that are text


def guard(tokenizer, text: str) -> str:
    """Mark what spells a control token in a message, so that it stays text in a template's rendering."""
    return control_tokens(tokenizer).sub(lambda token: token[0][0] + GUARD + token[0][1:], text.replace(GUARD, ""))


@functools.cache
def control_tokens(tokenizer) -> re.Pattern:
    """Finds the texts of control tokens."""
    texts = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or r"(?!)")


def encode_rendered(tokenizer, use: str, texts: list[str], bos: bool) -> list[array]:
    """Ids of what a template has rendered: its control tokens are tokens, and those that are guarded are text."""
    encoded = encode(tokenizer, use, [text.replace(GUARD, "") for text in texts], bos, True)
    for place, text in enumerate(texts):
        if GUARD in text:
            ids, at = array("i"), 0
            for token in [*control_tokens(tokenizer).finditer(text), None]:
                piece = text[at : token.start() if token else None].replace(GUARD, "")
                first = use if at == 0 else "response"
                ids += encode(tokenizer, first, [piece], bos and at == 0)[0]
                if token:
                    ids.append(tokenizer.convert_tokens_to_ids(token[0]))
                    at = token.end()
            encoded[place] = ids
    return encoded


def repeats(tokenizer, texts: list[str], prompt_ids: array, allow_control_tokens: bool) -> int:
    """What a row's cells spell of the tokens that are put there anyway: 1 BOS before the prompt, 2 EOS behind an answer, 3 both."""
    bos_token, bos_id, eos_token = _put_around(tokenizer)
    found = 0
    if bos_token and texts[0].startswith(bos_token):
        put = [bos_id] * (2 if allow_control_tokens else 1)  # what the tokenizer puts, and then what the cell spells
        found = int(prompt_ids[: len(put)].tolist() == put)
    for text in texts[1::2]:
        if text.rstrip().endswith(eos_token):
            found |= 2
    return found


@functools.cache  # transformers looks each up anew, which took a tenth of the data path
def _put_around(tokenizer: PreTrainedTokenizerBase) -> tuple[str | None, int | None, str]:
    return tokenizer.bos_token, tokenizer.bos_token_id, tokenizer.eos_token


def encode_segments(
    tokenizer, rows: list[list[str]], allow_control_tokens: bool, rendered: bool = False, bos: bool = True
) -> list[list[array] | None]:
    """Ids of each row's segments, the first as generation begins, the others as continuations, an EOS behind each that is trained.

    None for a row of several turns whose text, encoded at once as generation will at its last turn, has other ids.

    Args:
        rendered: the segments are pieces of a template's rendering, which wrote the control tokens itself.
        bos: a rendering gets its BOS from the tokenizer.
    """
    firsts, others = [row[0] for row in rows], [text for row in rows for text in row[1:]]
    if rendered:
        first_ids = encode_rendered(tokenizer, "prompt", firsts, bos)
        other_ids = iter(encode_rendered(tokenizer, "response", others, False))
    else:
        first_ids = encode_prompts(tokenizer, firsts, allow_control_tokens=allow_control_tokens)
        other_ids = iter(encode_responses(tokenizer, others, allow_control_tokens=allow_control_tokens))
    encoded: list = [[ids, *islice(other_ids, len(row) - 1)] for row, ids in zip(rows, first_ids, strict=True)]
    eos = tokenizer.eos_token_id
    for segments in encoded:
        for trained in segments[1::2]:
            trained.append(eos)
    long = [place for place, row in enumerate(rows) if len(row) > 2]
    texts = ["".join(text + tokenizer.eos_token * (at % 2) for at, text in enumerate(rows[place])) for place in long]
    for place, ids in zip(long, encode_rendered(tokenizer, "prompt", texts, bos) if long else []):
        if ids != sum(encoded[place], array("i")):
            encoded[place] = None
    return encoded


def encode(tokenizer, use: str, texts: list[str], bos: bool, allow_control_tokens: bool = False) -> list[array]:
    """Ids of each text by a fast tokenizer, as a "prompt" or as a "response"."""

    def encode_whole(texts: list[str]) -> list[array]:
        backend = backend_for(tokenizer, use, allow_control_tokens)
        encodings = backend.encode_batch_fast(texts, add_special_tokens=bos)
        return [array("i", encoding.ids) for encoding in encodings]

    words = words_of(tokenizer)
    if allow_control_tokens or not words.stand_alone:
        return encode_whole(texts)
    return words.encode(texts, encode_whole, (use, bos))


@functools.cache
def words_of(tokenizer: PreTrainedTokenizerBase) -> Words:
    return Words(backend_for(tokenizer, "response", False))


@functools.cache
def backend_for(tokenizer: PreTrainedTokenizerBase, use: str, allow_control_tokens: bool) -> Tokenizer:
    """A copy of the tokenizer's backend for prompts or for responses, made once: calls of the tokenizer change its own state."""
    backend = copy.deepcopy(tokenizer.backend_tokenizer)
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = not allow_control_tokens
    if use == "response":
        parts = {name: _without_prefix(part) for name, part in parts_before_model(backend).items()}
        empty = Tokenizer.from_str(json.dumps(json.loads(Tokenizer(BPE()).to_str()) | parts))
        backend.normalizer, backend.pre_tokenizer = empty.normalizer, empty.pre_tokenizer
    return backend


def _without_prefix(part: dict | None) -> dict | None:
    """A normalizer or pre-tokenizer (its JSON) that puts no space before the text; None if nothing is left of it."""
    if part is None or part["type"] == "Prepend" or part.get("pattern") == {"Regex": LEADING_SPACE}:
        return None
    if part["type"] == "Sequence":
        key = "normalizers" if "normalizers" in part else "pretokenizers"
        return part | {key: [kept for kept in map(_without_prefix, part[key]) if kept is not None]}
    settings: dict[str, dict] = {"Metaspace": {"prepend_scheme": "never"}, "ByteLevel": {"add_prefix_space": False}}
    return part | settings.get(part["type"], {})


def _after(tokenizer: PreTrainedTokenizerBase, anchor: str, text: str, **options) -> list[int] | None:
    """The ids of `text` after `anchor`, or None if a token spans the two."""
    options |= {"add_special_tokens": False, "verbose": False}
    before, joint = (tokenizer(part, **options).input_ids for part in (anchor, anchor + text))
    return joint[len(before) :] if joint[: len(before)] == before else None


def _slow_continuation(tokenizer: PreTrainedTokenizerBase, text: str, allow_control_tokens: bool) -> array:
    """The continuation by a tokenizer without a backend: what follows EOS, or a line end where control tokens must stay text."""
    literal = not allow_control_tokens and any(token in text for token in tokenizer.all_special_tokens)
    ids = _after(tokenizer, "\n" if literal else tokenizer.eos_token, text, split_special_tokens=literal)
    if ids is None:
        raise UserError(
            f"tokenizer: {text[:80]!r} merges with what comes before it, so its ids as a response are not defined. Use a fast tokenizer."
        )
    return array("i", ids)


def prove_ids(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise UserError unless prompts get the tokenizer's own ids, and responses those that follow EOS, on every probe.

    A line end in place of EOS proves it too: exports and older LLaMA pipelines put their prefix space after every control token.
    So does a letter that no vocabulary has, where the normalizer turns line ends into spaces.
    """
    control = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    plain = [text for text in PROBES if not any(token in text for token in control)]
    prompts, responses = encode_prompts(tokenizer, plain), encode_responses(tokenizer, plain)
    for text, prompt_ids, response_ids in zip(plain, prompts, responses, strict=True):
        after = [_after(tokenizer, anchor, text) for anchor in (tokenizer.eos_token, "\n", "\ue000")]
        for use, ids, own in (
            ("prompt", prompt_ids, [tokenizer(text, verbose=False).input_ids]),
            ("response", response_ids, after),
        ):
            if ids.tolist() not in own:
                raise UserError(
                    f"tokenizer: the {use} {text[:80]!r} gets {ids[:8].tolist()}…, but generation gives or meets {(own[0] or [])[:8]}…. "
                    "Report this model."
                )


def compare_with_reference(tokenizer, texts: list[str]) -> None:
    """Raise UserError with an example if any text's ids differ from those of `tokenizer.reference`."""
    if wrong := differences(tokenizer, texts):
        reference = tokenizer.reference
        raise UserError(
            f"tokenizer: {len(wrong)} of {len(texts)} texts get other ids than {reference.name} gives them with {reference.file}, "
            f"which the model was pre-trained with. First: {wrong[0]}. {reference.cure}"
        )


def differences(tokenizer, texts: list[str]) -> list[str]:
    """What differs, for each text whose ids are not those of `tokenizer.reference`."""
    found, reference = [], tokenizer.reference
    for text, ids, expected in zip(
        texts, encode(tokenizer, "prompt", texts, bos=False), reference.encode(texts), strict=True
    ):
        if (ours := ids.tolist()) != expected:
            first = next((i for i, (a, b) in enumerate(zip(ours, expected)) if a != b), min(len(ours), len(expected)))
            window = slice(max(0, first - 2), first + 6)
            found.append(f"{quoted(text, 120)} from token {first}: {ours[window]}, {reference.name} {expected[window]}")
    return found

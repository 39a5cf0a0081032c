"""Load a tokenizer as its files have it, and save it so that plain transformers reads the same ids."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import transformers
from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils.hub import cached_file

from sft.data import encode
from sft.job import UserError, say

# of a CSV: a few tenths of a second, and a good one, on two cores
ROWS_COMPARED = {"SentencePiece": 1000, "tokenizer.json": 10_000}


class Reference(NamedTuple):
    """What a tokenizer's ids must equal: SentencePiece's, or those of tokenizer.json."""

    name: str
    file: str
    encode: Callable[[list[str]], list[list[int]]]  # without BOS; control tokens are text
    rows: float  # of a CSV that are compared
    cure: str


def find_file(model_args, name: str) -> str | None:
    """Local path of a file of the model, downloaded from the hub where the model lies there; None if it has no such file."""
    where, cache_dir = model_args.model_name_or_path, model_args.cache_dir
    try:
        return cached_file(where, name, cache_dir=cache_dir, _raise_exceptions_for_missing_entries=False)
    except OSError as error:
        raise UserError(f"--model_name_or_path {where}: {error}") from error


def load_published(model_args) -> PreTrainedTokenizerBase:
    """Load tokenizer.json with the file's own steps, BOS as plain transformers puts it, and no EOS; `reference` is the file.

    transformers (5.23) builds the steps of some classes anew, whatever the file has: GPT2Tokenizer loses the splitting of digits.
    """
    where, remote = model_args.model_name_or_path, model_args.trust_remote_code
    try:
        tokenizer = AutoTokenizer.from_pretrained(where, cache_dir=model_args.cache_dir, trust_remote_code=remote)
    except Exception as error:  # tokenizers (0.23) has no class of its own for a damaged tokenizer.json
        raise UserError(f"{where}: transformers cannot load its tokenizer: {error}") from error
    path = find_file(model_args, "tokenizer.json")
    if path and tokenizer.is_fast:
        tokenizer = _with_steps_of(path, tokenizer, model_args)
    before, after = added_around(tokenizer)
    if tokenizer.eos_token_id in after:
        tokenizer.add_eos_token = False  # rebuilds the template, with a BOS that may be another one (transformers 5.23)
        if tokenizer.is_fast:
            tokenizer.backend_tokenizer.post_processor = putting_before(tokenizer.backend_tokenizer, before)
        say("tokenizer: it added EOS to every text; that is off, because a prompt does not end there")
    return tokenizer


def _with_steps_of(path: str, published: PreTrainedTokenizerBase, model_args) -> PreTrainedTokenizerBase:
    """The published tokenizer if its steps are those of tokenizer.json, else the file in a class that keeps them."""
    file = Tokenizer.from_file(path)
    file.no_truncation()
    file.no_padding()
    file.encode_special_tokens = True

    def ids(texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in file.encode_batch_fast(texts, add_special_tokens=False)]

    cure = "Report this model."
    published.reference = reference = Reference("tokenizer.json", path, ids, ROWS_COMPARED["tokenizer.json"], cure)
    if _steps(file) == _steps(published.backend_tokenizer):
        return published
    differences = encode.differences(published, encode.PROBES)
    backend = Tokenizer.from_file(path)
    backend.post_processor = published.backend_tokenizer.post_processor
    tokenizer = in_plain_class(backend, settings_of(published))
    tokenizer.reference = reference
    if differences:  # else they are written in another way alone, as far as the probes see
        say(
            f"tokenizer: transformers' {type(published).__name__} has other steps than tokenizer.json, with other ids on {len(differences)} of "
            f"{len(encode.PROBES)} probe texts; training and the saved model use the file's. First difference: {differences[0]}"
        )
    prove_reload(tokenizer, model_args)
    return tokenizer


def _steps(backend: Tokenizer) -> list[bytes | None]:
    """What makes ids of a text, as bytes that are equal where it is."""
    parts = (backend.normalizer, backend.pre_tokenizer, backend.model)
    return [part and part.__getstate__() for part in parts]


def settings_of(published: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What a tokenizer has besides its steps, by the names in tokenizer_config.json."""
    names = "chat_template model_max_length padding_side truncation_side clean_up_tokenization_spaces extra_special_tokens added_tokens_decoder"
    return {name: getattr(published, name) for name in names.split()} | published.special_tokens_map


def in_plain_class(backend: Tokenizer, settings: dict[str, Any]) -> PreTrainedTokenizerFast:
    """A tokenizer whose steps are the backend's, with these of tokenizer_config.json's settings; what is empty is left out."""
    given = {name: value for name, value in settings.items() if value not in (None, [], {})}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **{"clean_up_tokenization_spaces": False} | given)


def added_around(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Ids that the tokenizer puts before, and after, every text: BOS, EOS."""
    whole, text = (tokenizer("a", add_special_tokens=added).input_ids for added in (True, False))
    start = next(i for i in range(len(whole)) if whole[i : i + len(text)] == text)
    return whole[:start], whole[start + len(text) :]


def putting_before(backend: Tokenizer, ids: list[int]) -> processors.TemplateProcessing:
    """The step that puts these ids before every text."""
    tokens = [backend.id_to_token(i) for i in ids]
    pair = [*tokens, "$A", *(f"{token}:1" for token in tokens), "$B:1"]
    return processors.TemplateProcessing(
        single=[*tokens, "$A"], pair=pair, special_tokens=list(zip(tokens, ids, strict=True))
    )


def finish(tokenizer: PreTrainedTokenizerBase, model_args) -> None:
    """Set pad, name the BOS that is put, and prove the ids of prompts and responses on this very tokenizer."""
    if tokenizer.eos_token_id is None:
        raise UserError(
            f"{model_args.model_name_or_path}: the tokenizer has no EOS token, so a response could not be ended. "
            "Name one as eos_token in tokenizer_config.json."
        )
    tokenizer.pad_token = tokenizer.eos_token if tokenizer.unk_token_id is None else tokenizer.unk_token
    say(f"tokenizer: pad is {tokenizer.pad_token!r} ({tokenizer.pad_token_id}); padding is never trained on")
    before, _ = added_around(tokenizer)
    if len(before) == 1 and before[0] != tokenizer.bos_token_id:
        declared, tokenizer.bos_token = tokenizer.bos_token, tokenizer.convert_ids_to_tokens(before[0])
        say(f"tokenizer: BOS is {tokenizer.bos_token!r} ({before[0]}), which it puts before a prompt, not {declared!r}")
    encode.prove_ids(tokenizer)
    if getattr(tokenizer, "reference", None):
        encode.compare_with_reference(tokenizer, encode.PROBES)


def save(tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Save for plain transformers, 4 and 5: the class that only 5 calls TokenizersBackend gets the name that both know."""
    tokenizer.save_pretrained(folder)
    path = Path(folder, "tokenizer_config.json")
    config = json.loads(path.read_text(encoding="utf-8"))
    if config["tokenizer_class"] == "TokenizersBackend":
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        path.write_text(json.dumps(config, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def prove_reload(tokenizer: PreTrainedTokenizerBase, model_args) -> None:
    """Raise UserError unless plain transformers gives a saved copy the same ids: it chooses some classes by the model's type."""
    config = find_file(model_args, "config.json")
    with tempfile.TemporaryDirectory() as folder:
        save(tokenizer, folder)
        if config:
            Path(folder, "config.json").write_bytes(Path(config).read_bytes())
        reloaded = AutoTokenizer.from_pretrained(folder)
    texts = encode.PROBES
    ours, theirs = ([by(text, verbose=False).input_ids for text in texts] for by in (tokenizer, reloaded))
    if wrong := [text for text, one, other in zip(texts, ours, theirs) if one != other]:
        where = model_args.model_name_or_path
        raise UserError(
            f"{where}: transformers {transformers.__version__} reads this model's tokenizer with {type(reloaded).__name__}, whatever its files "
            f"say, and gives {len(wrong)} of {len(texts)} probe texts other ids than tokenizer.json, for example {wrong[0][:60]!r}. A model tuned "
            "on the file's ids would be asked with those. To train with transformers' ids, replace the file by them: "
            f'python -c "from transformers import AutoTokenizer; AutoTokenizer.from_pretrained({where!r}).save_pretrained({where!r})"'
        )

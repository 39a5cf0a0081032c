"""Build a fast XGen tokenizer without remote code: transformers 5 cannot load the published one."""

import json
from multiprocessing import TimeoutError
from multiprocessing.pool import ThreadPool
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode, generate_merges

from sft.data.tokenizer_files import find_file, finish, load_published
from sft.job import UserError

XGEN_EOS, XGEN_EOS_ID, XGEN_VOCABULARY = "<|endoftext|>", 50256, 51200
TIKTOKEN_PATIENCE_S = 60  # it downloads 1.5 MB, once
_FIM = (
    "<fim_prefix> <fim_middle> <fim_suffix> <fim_pad> <filename> <gh_stars> <issue_start> <issue_comment> <issue_closed> "
    "<jupyter_start> <jupyter_text> <jupyter_code> <jupyter_output> <empty_output> <commit_before> <commit_msg> <commit_after> <reponame>"
).split()


def load_xgen_tokenizer(model_args) -> PreTrainedTokenizerBase:
    """Load XGen's tokenizer as a fast one: GPT-2's BPE, runs of spaces and tabs, and tags; no BOS, pad = EOS.

    A `tokenizer.json` in the model's folder (an export of this project) is used after its ids are checked.
    """
    if find_file(model_args, "tokenizer.json"):
        tokenizer = load_published(model_args)
        _check_xgen(tokenizer, f"{model_args.model_name_or_path}/tokenizer.json")
    else:
        ranks = _ranks_from_files(model_args.gpt2_files) if model_args.gpt2_files else _ranks_from_tiktoken()
        options = {"eos_token": XGEN_EOS, "clean_up_tokenization_spaces": False}
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=_xgen_backend(ranks), **options)
    finish(tokenizer, model_args)
    return tokenizer


_LETTERS = bytes_to_unicode()  # GPT-2's vocab.json writes a letter for each byte


def _spelled(token: bytes) -> str:
    """The bytes in the letters that GPT-2's vocab.json writes them with."""
    return "".join(_LETTERS[byte] for byte in token)


def _additions() -> tuple[dict[str, int], dict[str, int]]:
    """(runs of spaces and tabs, which merge like any BPE token; tags), each with its id, as XGen's published code adds them to GPT-2."""
    runs = [_spelled(b" " * n) for n in range(31, 1, -1)] + [_spelled(b"\t" * n) for n in range(9, 1, -1)]
    first = XGEN_EOS_ID + 1
    tags = [*_FIM, *(f"<dummy_{i}>" for i in range(4)), "<sep>", "<eom>"]
    tags += [f"<mask_{i}>" for i in range(XGEN_VOCABULARY - first - len(runs) - len(tags), 0, -1)]
    ids = {token: first + i for i, token in enumerate(runs + tags)}
    return {run: ids[run] for run in runs}, {XGEN_EOS: XGEN_EOS_ID} | {tag: ids[tag] for tag in tags}


def _xgen_backend(ranks: dict[str, int]) -> Tokenizer:
    """GPT-2's mergeable ranks with XGen's additions, as a `tokenizers` pipeline."""
    runs, tags = _additions()
    # tiktoken merges any neighbours whose joint token has the lowest rank: every split of a token is a merge at its rank.
    backend = Tokenizer(BPE(vocab=ranks | runs | tags, merges=generate_merges(ranks | runs, None)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(tag, normalized=False, special=True) for tag in tags])
    return backend


def _ranks_from_tiktoken() -> dict[str, int]:
    import tiktoken

    try:
        # tiktoken 0.14 downloads without a time limit; a machine whose network swallows packets would wait for ever.
        encoding = ThreadPool(1).apply_async(tiktoken.get_encoding, ("gpt2",)).get(TIKTOKEN_PATIENCE_S)
    except (OSError, ValueError, TimeoutError) as error:  # requests' errors are OSErrors; a wrong hash is a ValueError
        reason = str(error)[:200] or f"no answer in {TIKTOKEN_PATIENCE_S} s"
        raise UserError(
            f"xgen tokenizer: tiktoken cannot get GPT-2's files ({type(error).__name__}: {reason}). On a machine without a network, copy GPT-2's "
            "vocab.json and merges.txt (hub repository openai-community/gpt2) into a folder and give it with --gpt2_files FOLDER, or set TIKTOKEN_CACHE_DIR "
            "to a copy of tiktoken's cache."
        ) from None
    return {_spelled(token): rank for token, rank in encoding._mergeable_ranks.items()}


def _ranks_from_files(folder: str) -> dict[str, int]:
    """GPT-2's mergeable ranks from vocab.json, checked against merges.txt line by line."""
    try:
        vocab = json.loads(Path(folder, "vocab.json").read_text(encoding="utf-8"))
        merges = Path(folder, "merges.txt").read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as error:
        raise UserError(
            f"--gpt2_files {folder}: vocab.json and merges.txt cannot be read from it ({error})."
        ) from error
    ids = [vocab.get(line.replace(" ", "")) for line in merges if line.strip() and not line.startswith("#version")]
    if vocab.pop(XGEN_EOS, None) != XGEN_EOS_ID or len(vocab) != XGEN_EOS_ID or ids != list(range(256, XGEN_EOS_ID)):
        raise UserError(
            f"--gpt2_files {folder}: not GPT-2's files. vocab.json must hold 50257 tokens with {XGEN_EOS} = 50256, and line i of merges.txt must make token 256 + i."
        )
    return vocab


def _check_xgen(tokenizer: PreTrainedTokenizerBase, where: str) -> None:
    runs, tags = _additions()
    vocab = tokenizer.get_vocab()
    wrong = [f"{t!r} has id {vocab.get(t)}, XGen's is {i}" for t, i in (tags | runs).items() if vocab.get(t) != i]
    if wrong or sorted(vocab.values()) != list(range(XGEN_VOCABULARY)):
        detail = wrong[0] if wrong else f"it has {len(vocab)} tokens, XGen {XGEN_VOCABULARY}"
        raise UserError(
            f"{where}: not XGen's tokenizer: {detail}. Use llama_training.py for a LLaMA model, or take tokenizer.json out of the folder so that XGen's is built."
        )

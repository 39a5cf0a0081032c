"""From rows to a batch: what becomes of each row, and which tokens are trained."""

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from characters import BOS, EOS, PAD, character_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from rows_at_hand import CELLS, MANY, examples_of, problems_of
from transformers import PreTrainedTokenizer

import utils
from sft import IGNORE_INDEX as IGNORED
from sft.data import audit, token_cache
from sft.job import UserError


def test_ids_and_labels_by_hand(write, make):
    dataset = make(write([("ab", "cd"), ("é", " x")]))["train_dataset"]
    assert examples_of(dataset) == [
        ([BOS, 97, 98, 99, 100, EOS], [IGNORED, IGNORED, IGNORED, 99, 100, EOS]),
        ([BOS, 0xC3, 0xA9, 32, 120, EOS], [IGNORED, IGNORED, IGNORED, 32, 120, EOS]),
    ]
    assert dataset[0]["input_ids"].dtype == dataset[0]["labels"].dtype == torch.int64


def test_rows_without_text_or_room_are_dropped_and_long_ones_cut(write, make):
    module = make(
        write(
            [
                ("a", "bcd"),  # BOS a b c d EOS: fits exactly
                ("a", "bcde"),  # one too long: the EOS goes
                ("abcd", "efgh"),  # room for one trained token
                ("abcde", "f"),  # no room
                ("", "b"),
                ("a", ""),
                (" \n", "b"),
                ("a", "\t "),
                ("ab", "c"),
            ]
        ),
        max_length=6,
    )
    dataset = module["train_dataset"]
    assert examples_of(dataset) == [
        ([BOS, 97, 98, 99, 100, EOS], [IGNORED, IGNORED, 98, 99, 100, EOS]),
        ([BOS, 97, 98, 99, 100, 101], [IGNORED, IGNORED, 98, 99, 100, 101]),
        ([BOS, 97, 98, 99, 100, 101], [IGNORED, IGNORED, IGNORED, IGNORED, IGNORED, 101]),
        ([BOS, 97, 98, 99, EOS], [IGNORED, IGNORED, IGNORED, 99, EOS]),
    ]
    assert dataset.row_numbers.tolist() == [2, 3, 4, 10]
    assert dataset.lengths.tolist() == [6, 6, 6, 5] and dataset.prompt_lengths.tolist() == [2, 2, 5, 3]
    assert dataset.counts == {
        "rows_read": 9, "rows_empty": 4, "rows_no_room": 1, "rows_cut": 2, "rows_shortened": 0, "rows_disagreed": 0,
        "kept": 4, "tokens": 23, "trained_tokens": 11,
        "largest_id": EOS,
    }  # fmt: skip


def test_nothing_left_is_an_error_with_the_counts(write, make):
    path = write([("abc", "d"), ("", "b")])
    assert problems_of(make, path, max_length=4) == [
        f"{path}: 2 rows read, 0 kept (0 cut, without EOS); dropped: 1 empty, 1 whose prompt leaves no room. "
        "Nothing is left to train on: raise --model_max_length; fill in the empty prompts and responses, or name other columns."
    ]


def test_a_control_token_in_a_cell_is_text_unless_a_flag_says_otherwise(write, make):
    path = write([("</s>", "a</s>")])
    literal = [ord(character) for character in "</s>"]
    text, control = (make(path, allow_control_tokens=allow)["train_dataset"][0] for allow in (False, True))
    assert text["input_ids"].tolist() == [BOS, *literal, 97, *literal, EOS]
    assert control["input_ids"].tolist() == [BOS, EOS, 97, EOS, EOS]


def test_prompt_and_response_do_not_merge(write, make):
    merging = character_tokenizer(":/")
    assert merging("a:/b").input_ids == [BOS, 97, 259, 98]  # what a joint tokenization would train on
    dataset = make(write([("a:", "/b")]), tokenizer=merging)["train_dataset"]
    assert examples_of(dataset) == [([BOS, 97, 58, 47, 98, EOS], [IGNORED, IGNORED, IGNORED, 47, 98, EOS])]


@MANY
@given(cells=st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=6), max_length=st.integers(4, 80))
def test_trained_tokens_are_the_response_and_eos(tmp_path_factory, characters, cells, max_length):
    batch = utils.tokenize(
        [list(row) if all(map(str.strip, row)) else token_cache.EMPTY for row in cells], characters, False, max_length
    )
    outcomes = {row: token_cache.OUTCOMES[outcome] for row, outcome in zip(cells, batch.outcomes)}
    starts = np.cumsum(batch.lengths) - batch.lengths
    kept = [row for row, outcome in zip(cells, batch.outcomes) if token_cache.OUTCOMES[outcome] in ("kept", "cut")]
    assert len(kept) == len(batch.lengths)
    for (prompt, response), start, length, prompt_length in zip(kept, starts, batch.lengths, batch.prompt_lengths):
        ids = batch.tokens[start : start + length].tolist()
        trained = [*response.encode(), EOS]
        assert ids[:prompt_length] == [BOS, *prompt.encode()]
        assert ids[prompt_length:] == trained[: max_length - prompt_length]
        assert outcomes[prompt, response] == ("kept" if prompt_length + len(trained) <= max_length else "cut")
    for (prompt, response), outcome in outcomes.items():
        if outcome == "empty":
            assert not prompt.strip() or not response.strip()
        elif outcome == "no_room":
            assert len(prompt.encode()) + 1 >= max_length


class SlowCharacters(PreTrainedTokenizer):
    """The character tokenizer written in Python."""

    def __init__(self, **kwargs):
        self.vocabulary = {chr(code): code for code in range(256)} | {"<s>": BOS, "</s>": EOS}
        super().__init__(bos_token="<s>", eos_token="</s>", **kwargs)

    @property
    def vocab_size(self):
        return 258

    def get_vocab(self):
        return self.vocabulary

    def _tokenize(self, text):
        return list(text)

    def _convert_token_to_id(self, token):
        return self.vocabulary[token]

    def _convert_id_to_token(self, index):
        return next(token for token, i in self.vocabulary.items() if i == index)

    def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
        return [BOS, *token_ids_0]


def test_a_tokenizer_written_in_python_gives_the_same_rows(write, make):
    path = write([(f"question {n}", f"answer {n * n}") for n in range(3000)])  # three batches
    slow, fast = (
        make(path, tokenizer=tokenizer)["train_dataset"] for tokenizer in (SlowCharacters(), character_tokenizer())
    )
    assert slow.parts[0].rows.folder != fast.parts[0].rows.folder
    assert np.array_equal(slow.parts[0].rows.tokens, fast.parts[0].rows.tokens) and np.array_equal(
        slow.lengths, fast.lengths
    )


def test_prompts_and_responses_are_compared_with_the_reference(write, make, characters, monkeypatch):
    def compare(tokenizer, texts):
        raise UserError(texts)

    path = write([("ab", "cd"), ("ef", "gh")])
    monkeypatch.setattr(utils.encode, "compare_with_reference", compare)
    assert len(make(path)["train_dataset"]) == 2  # without one there is nothing to compare with
    monkeypatch.setattr(characters, "reference", SimpleNamespace(file=path, rows=1), raising=False)
    template = write("Q: {instruction}", "template.txt")
    assert problems_of(make, path, prompt_template=template) == ["Q: ab", "Q: ef", "cd", "gh"]


def test_the_dataset_maps_the_file_and_never_copies_it(write, make):
    dataset = make(write([(f"prompt {n}", "r" * (n % 7 + 1)) for n in range(500)]))["train_dataset"]
    rows = dataset.parts[0].rows
    assert isinstance(rows.tokens.base, np.memmap) and not rows.tokens.flags.writeable
    before = examples_of(dataset)
    dataset[3]["input_ids"][:] = 0  # an example is the caller's own
    pickled = pickle.dumps(rows)  # what a data loader's worker is sent
    assert len(pickled) < 1000 < rows.tokens.nbytes
    assert isinstance(pickle.loads(pickled).tokens.base, np.memmap)
    assert examples_of(pickle.loads(pickle.dumps(dataset))) == before == examples_of(dataset)


def test_padded_batch(characters):
    examples = [
        {"input_ids": torch.tensor([1, 2, 3]), "labels": torch.tensor([IGNORED, 2, 3])},
        {"input_ids": torch.tensor([4, EOS]), "labels": torch.tensor([IGNORED, EOS])},
    ]
    collator = utils.DataCollatorForSupervisedDataset(characters)
    batch = collator(examples)
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[1, 2, 3], [4, EOS, PAD]],
        "labels": [[IGNORED, 2, 3], [IGNORED, EOS, IGNORED]],
        "attention_mask": [[1, 1, 1], [1, 1, 0]],
    }
    nothing = {name: tensor.tolist() for name, tensor in collator([]).items()}  # of a rank that has no example left
    assert nothing == {"input_ids": [[0]], "labels": [[IGNORED]], "attention_mask": [[1]]}
    characters_with_eos_as_pad = character_tokenizer()
    characters_with_eos_as_pad.pad_token = "</s>"
    batch = utils.DataCollatorForSupervisedDataset(characters_with_eos_as_pad)(examples)
    assert batch["input_ids"].tolist()[1] == [4, EOS, EOS]
    assert batch["labels"].tolist()[1] == [IGNORED, EOS, IGNORED]  # the real EOS is trained, the padding is not
    assert batch["attention_mask"].tolist()[1] == [1, 1, 0]


def test_eval_split_holds_out_the_same_rows_in_every_run(write, make):
    path = write([(f"p{n}", "r") for n in range(50)])
    splits = [make(path, eval_split=0.1) for _ in range(2)]
    train, evaluation = (splits[0][name].row_numbers for name in ("train_dataset", "eval_dataset"))
    assert len(evaluation) == 5 and sorted([*train, *evaluation]) == list(range(2, 52))
    assert evaluation.tolist() == splits[1]["eval_dataset"].row_numbers.tolist() == [4, 6, 20, 25, 38]
    assert splits[0]["train_dataset"].counts["kept"] == 45 and splits[0]["eval_dataset"].counts["tokens"] == sum(
        splits[0]["eval_dataset"].lengths
    )
    assert len(make(path, eval_split=0.001)["eval_dataset"]) == 1
    assert make(path)["eval_dataset"] is None
    assert [line.split(". ")[0] for line in problems_of(make, path, eval_split=0.999)] == [
        "--eval_split 0.999 leaves none of 50 examples to train on; they have 50 different prompts"
    ]


def test_rows_with_the_same_prompt_stay_on_one_side(write, make):
    path = write([(f"p{n % 10}", f"r{n}") for n in range(40)])  # each prompt four times
    module = make(path, eval_split=0.25)
    train, evaluation = (module[name].row_numbers for name in ("train_dataset", "eval_dataset"))
    assert len(evaluation) == 8 and sorted([*train, *evaluation]) == list(range(2, 42))
    assert not {(row - 2) % 10 for row in train} & {(row - 2) % 10 for row in evaluation}
    assert len(make(path, eval_split=0.01)["eval_dataset"]) == 4  # one prompt at least
    assert len(problems_of(make, write([("p", f"r{n}") for n in range(9)]), eval_split=0.1)) == 1


def test_eval_rows_of_their_own_file(write, make):
    module = make(write([("a", "b")]), eval_data_path=write([("c", "d"), ("e", "f")], "eval.csv"))
    assert examples_of(module["train_dataset"])[0][0] == [BOS, 97, 98, EOS]
    assert [ids for ids, _ in examples_of(module["eval_dataset"])] == [[BOS, 99, 100, EOS], [BOS, 101, 102, EOS]]


def test_eval_prompts_that_are_also_trained_on_are_said_once(write, make, capsys):
    path = write([("a", "b"), ("c", "d"), ("c", "e"), ("ab", "f"), ("g", "")])
    own = write([("c", "another"), ("h", "b"), ("", "i"), ("a", "b"), ("c", "d"), ("abc", "f"), ("g", "j")], "eval.csv")
    make(path, eval_data_path=own)
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    leak = "rows of --eval_data_path have a prompt that is also trained on; they say little about new prompts"
    assert warnings == [f"warning: {leak}: 3 (rows 2, 5, 6)"]
    make(path, eval_data_path=write([("h", "b"), ("g", "j")], "eval.csv"))
    make(path, eval_split=0.3)
    assert "warning" not in capsys.readouterr().out


def test_what_is_said_about_the_rows(write, make, capsys):
    path = write([("ab", "\x1b[2Jc\n"), ("", "x"), ("a" * 20, "b"), ("a", "b" * 20)])
    make(path, max_length=20)
    assert capsys.readouterr().out == (
        f"{path}: 4 rows read, 2 kept (1 cut, without EOS); dropped: 1 empty, 1 whose prompt leaves no room\n"
        "training: 2 examples, 30 tokens, 25 of them trained (83%); tokens per example: mean 15, median 15, 99 % 20, longest 20\n"
        "row 2, its trained tokens in [...]:\n"
        "<s>ab[\\x1b[2Jc\n</s>]\n"
    )


def test_the_trained_tokens_are_green_on_a_terminal(write, make, characters):
    dataset = make(write([("ab", "cd")]))["train_dataset"]
    said = audit.describe_example(characters, dataset, 0, colour=True)
    assert said == "row 2, its trained tokens in green:\n<s>ab\x1b[32mcd</s>\x1b[0m"


@pytest.mark.parametrize("allow", [False, True])
def test_a_token_and_text_that_spells_it_look_different(write, make, characters, allow, capsys):
    path = write([("<s>a</s>", "b</s>")])
    dataset = make(path, allow_control_tokens=allow)["train_dataset"]
    spelt = "<s>a</s>[b</s></s>]" if allow else "\\<s>a\\</s>[b\\</s></s>]"
    assert audit.describe_example(characters, dataset, 0, colour=False).endswith(f"\n<s>{spelt}")
    then = "the token stands there twice" if allow else "it is text there, beside the token itself"
    assert (
        f"warning: {path}: responses end with </s>, which is put there anyway: {then}: 1 (row 2)\n"
        in capsys.readouterr().out
    )


def test_a_share_that_whole_prompts_cannot_give_is_said(write, make, capsys):
    make(write([("a", str(n)) for n in range(20)] + [("b", str(n)) for n in range(20)]), eval_split=0.1)
    said = "--eval_split 0.1 asks for 4 of 40 examples, and 20 are held out: rows with the same prompt stay together, and the largest group has 20"
    assert f"warning: {said}\n" in capsys.readouterr().out


def test_only_rank_0_speaks(write, make, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    make(write([("ab", "cd")]))
    assert capsys.readouterr().out == ""

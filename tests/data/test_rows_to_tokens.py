"""From a CSV to a batch: what is read, what becomes of each row, and which tokens are trained."""

import csv
import io
import os
import pickle
import sys
import time

import numpy as np
import pytest
import torch
from characters import BOS, EOS, PAD, character_tokenizer
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizer

import utils
from sft.data import audit, checks, csv_rows, token_cache
from sft.data.csv_rows import read_csv
from sft.flags import DataArguments, TrainingArguments
from sft.job import UserError

IGNORED = utils.IGNORE_INDEX
MANY = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])

# Everything that has broken a CSV reader before: line ends, quotes, a BOM, marks that combine, text from right to left.
HAZARDS = st.sampled_from(
    [
        "\n",
        "\r\n",
        "\r",
        '"',
        '""',
        ",",
        "\ufeff",
        "e\u0301",
        "👩‍👩‍👧",
        "שלום",
        "\u202e",
        "\x1b[31m",
        "\x85",
        "\u2028",
        "NA",
        "18",
        " ",
    ]
)
CELLS = st.lists(
    st.one_of(HAZARDS, st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)),
    max_size=6,
).map("".join)


@pytest.fixture(scope="module")
def characters():
    return character_tokenizer()


@pytest.fixture
def write(tmp_path):
    """Write rows below a `prompt,response` header, or text or bytes as they are; return the path."""

    def write(content, name="data.csv"):
        path = tmp_path / name
        if isinstance(content, list):
            text = io.StringIO(newline="")
            csv.writer(text).writerows([("prompt", "response"), *content])
            content = text.getvalue()
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return str(path)

    return write


@pytest.fixture
def make(tmp_path, characters):
    """Make the data module from a CSV with the character tokenizer and a cache of this test's own."""

    def make(path, max_length=64, tokenizer=characters, **flags):
        data_args = DataArguments(data_path=path, data_cache_dir=str(tmp_path / "cache"), **flags)
        training_args = TrainingArguments(output_dir=str(tmp_path / "out"), model_max_length=max_length, use_cpu=True)
        return utils.make_supervised_data_module(tokenizer, data_args, training_args)

    return make


def problems_of(function, *args, **kwargs) -> list[str]:
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    return caught.value.problems


def faults(path) -> list[str]:
    return problems_of(lambda: list(read_csv(path, "prompt", "response")))


# ------------------------------------------------------------------------------------------------------------- CSV


@MANY
@given(
    cells=st.lists(st.tuples(CELLS, CELLS, CELLS), min_size=1, max_size=5),
    line_end=st.sampled_from(["\n", "\r\n", "\r"]),
    bom=st.booleans(),
)
def test_every_cell_is_read_byte_for_byte(write, cells, line_end, bom):
    text = io.StringIO(newline="")
    # csv.writer (3.11) leaves a line feed unquoted unless it ends lines with one.
    quoting = csv.QUOTE_MINIMAL if line_end == "\r\n" else csv.QUOTE_ALL
    writer = csv.writer(text, quoting=quoting, lineterminator=line_end)
    writer.writerows([("response", "other", "prompt"), *cells])
    path = write(("\ufeff" if bom else "") + text.getvalue())
    with open(path, encoding="utf-8-sig", newline="") as file:
        expected = [(number, row[2], row[0]) for number, row in enumerate(csv.reader(file), 1)][1:]
    assert [row[::-1] for row in cells] == [(p, other, r) for (_, p, r), (_, other, _) in zip(expected, cells)]
    assert list(read_csv(path, "prompt", "response")) == expected


def test_text_that_other_readers_change_stays_text(write):
    path = write('prompt,response\r\nNA,18\r\n" a ","1\r\n2\r"\r\n"say ""hi""",nan\r\n')
    assert list(read_csv(path, "prompt", "response")) == [
        (2, "NA", "18"),
        (3, " a ", "1\r\n2\r"),
        (4, 'say "hi"', "nan"),
    ]


def test_a_blank_line_is_a_row_with_nothing_in_it(write):
    assert list(read_csv(write("prompt,response\na,b\n\nc,d\n"), "prompt", "response")) == [
        (2, "a", "b"),
        (3, "", ""),
        (4, "c", "d"),
    ]


def test_batches_are_bounded_in_rows_and_in_characters(write, monkeypatch):
    monkeypatch.setattr(csv_rows, "ROWS_PER_BATCH", 3)
    monkeypatch.setattr(csv_rows, "CHARACTERS_PER_BATCH", 10)
    path = write([("a", "b")] * 4 + [("c" * 5, "d" * 5), ("e", "f"), ("g", "h")])
    sizes = [len(batch) for batch in csv_rows.read_batches(path, "prompt", "response")]
    assert sizes == [3, 2, 2]  # three rows; 12 characters are above 10; what is left


def test_a_very_long_cell(write):
    cell = "word, \n" * 300_000  # 2.1 million characters; csv's own limit is 131,072
    assert list(read_csv(write([(cell, "b")]), "prompt", "response")) == [(2, cell, "b")]


NUL_COLUMN = ", column 'response'" if sys.version_info >= (3, 11) else ""  # csv.reader itself refuses it in Python 3.10


@pytest.mark.parametrize(
    "content, said",
    [
        ("", ": the file is empty. Its first row must name the columns."),
        ("\nprompt,response\n", ": row 1 is blank. Its first row must name the columns."),
        ("prompt,response\n", ": a header and no rows. Add the training examples below it."),
        ("prompt,response\na,b\nc\n", ", row 3: 1 field where the header has 2. Add the missing ones, or put a cell that holds a comma in quotes."),
        ("prompt,response\na,b,c\n", ", row 2: 3 fields where the header has 2. Add the missing ones, or put a cell that holds a comma in quotes."),
        ('prompt,response\na,b\n"c\n\n,d\n', ", row 3: a quote is opened and never closed. Close it; a quote inside a cell is written twice."),
        ('prompt,response\na,"b"c"\n', ", row 2: text after a closing quote. A quote inside a cell is written twice."),
        ("prompt,response\na,b\nc,d\0e\n", f", row 3{NUL_COLUMN}: a NUL byte. Remove it."),
        (b"prompt,response\n\xff,b\n", ", row 2, column 'prompt': byte 0xff is not UTF-8. Save the file as UTF-8."),
        (b'\xef\xbb\xbfprompt,response\n"\xc3\xa9\n\n",b\nc,d\xc3\n', ", row 3, column 'response': byte 0xc3 is not UTF-8. Save the file as UTF-8."),
        (b"prompt,response\na,b\xe2\x82", ", row 2, column 'response': byte 0xe2 is not UTF-8. Save the file as UTF-8."),
        ("prompt,response\na,b\n".encode("utf-16"), ", row 1: byte 0xff is not UTF-8. Save the file as UTF-8."),
        ("prompt,respond\na,b\n", ": no column 'response'. Its columns are 'prompt', 'respond'. Name the right one with --target."),
        ("prompt;response\na;b\n", [": no column 'prompt'. Its columns are 'prompt;response'. Name the right one with --source.",
                                    ": no column 'response'. Its columns are 'prompt;response'. Name the right one with --target."]),
        ("prompt,response,prompt\na,b,c\n", ": 2 columns are named 'prompt'. Rename or remove one."),
    ],
)  # fmt: skip
def test_each_fault_is_one_message_with_its_row(write, content, said):
    path = write(content)
    assert faults(path) == [path + line for line in ([said] if isinstance(said, str) else said)]


def test_faults_of_many_rows_are_said_together_and_no_row_follows_the_first(write):
    path = write("prompt,response\na,b\nc\nd,e\n" + "f,g,h\n" * 20)
    read = []
    said = problems_of(lambda: read.extend(read_csv(path, "prompt", "response")))
    assert read == [(2, "a", "b")]
    assert [line.split(":")[0] for line in said] == [f"{path}, row {row}" for row in (3, 5, 6, 7, 8, 9, 10, 11, 12, 13)]


def test_a_cell_without_end_does_not_fill_the_memory(write, monkeypatch):
    monkeypatch.setattr(csv_rows, "LARGEST_CELL", 100)
    path = write('prompt,response\na,"b\n' + "c,d\n" * 100)
    assert [line.split(" Mi ")[0] for line in faults(path)] == [f"{path}, row 2: a cell above 64"]


def test_files_that_cannot_be_read(tmp_path):
    assert faults(str(tmp_path / "no.csv")) == [
        f"{tmp_path}/no.csv: No such file or directory. Give a CSV file that can be read."
    ]
    assert faults(str(tmp_path)) == [f"{tmp_path}: Is a directory. Give a CSV file that can be read."]
    if os.path.exists("/proc/self/mem"):  # opens, and fails when it is read
        assert faults("/proc/self/mem") == ["/proc/self/mem: Input/output error. Give a CSV file that can be read."]


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_a_file_without_permission(write):
    path = write("prompt,response\na,b\n")
    os.chmod(path, 0)
    assert faults(path) == [f"{path}: Permission denied. Give a CSV file that can be read."]


def test_a_message_never_sends_a_cell_to_the_terminal(write):
    (line,) = faults(write("prompt,\x1b[31mresponse\u202e\na,b\n"))
    assert line.isprintable() and r"'\x1b[31mresponse\u202e'" in line


def test_problems_that_are_known_together_are_said_together(write, tmp_path):
    template = tmp_path / "template.txt"
    template.write_text("{instruction} and {instruction}")
    flags = {"prompt_template": str(template), "eval_data_path": "no.csv", "eval_split": 0.5}
    said = checks.data_problems(DataArguments(data_path=write("a,b\n1,2\n"), **flags))
    assert [line.split(":")[0].split()[0] for line in said] == [
        "--prompt_template",
        "--eval_data_path",
        f"{tmp_path}/data.csv",
        f"{tmp_path}/data.csv",
        "no.csv",
    ]
    assert checks.data_problems(DataArguments(data_path=write([("a", "b")]), eval_split=1.0)) == [
        "--eval_split 1: give a share from 0 up to 1, such as 0.02."
    ]


# ----------------------------------------------------------------------------------------------- tokens and labels


def examples_of(dataset) -> list[tuple[list[int], list[int]]]:
    return [(example["input_ids"].tolist(), example["labels"].tolist()) for example in dataset]


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
        "rows_read": 9, "rows_empty": 4, "rows_no_room": 1, "rows_cut": 2, "kept": 4, "tokens": 23, "trained_tokens": 11,
        "largest_id": EOS,
    }  # fmt: skip


def test_nothing_left_is_an_error_with_the_counts(write, make):
    path = write([("abc", "d"), ("", "b")])
    assert problems_of(make, path, max_length=4) == [
        f"{path}: 2 rows read; 1 dropped as empty, 1 dropped because the prompt leaves no room, 0 kept, of which 0 are cut "
        "and lost their EOS. Nothing is left to train on: raise --model_max_length or mend the rows."
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


def test_template(write, make, tmp_path, characters):
    template = tmp_path / "template.txt"
    template.write_bytes(b"Q: {instruction}\r\n{x}\n")
    path = write([("{instruction} 1+1?", "2")])
    dataset = make(path, prompt_template=str(template))["train_dataset"]
    assert characters.decode(dataset[0]["input_ids"]) == "<s>Q: {instruction} 1+1?\r\n{x}\n2</s>"
    dataset = make(path, max_length=512, prompt_template="alpaca")["train_dataset"]
    assert characters.decode(dataset[0]["input_ids"]) == (
        "<s>Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\n{instruction} 1+1?\n\n### Response:2</s>"
    )
    assert problems_of(make, path, prompt_template=str(tmp_path)) == [
        f"--prompt_template {tmp_path}: Is a directory. Give 'none', 'alpaca', or a text file."
    ]


@MANY
@given(cells=st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=6), max_length=st.integers(4, 80))
def test_trained_tokens_are_the_response_and_eos(tmp_path_factory, characters, cells, max_length):
    batch = utils.tokenize(cells, characters, "{instruction}", False, max_length)
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
    assert slow.rows.folder != fast.rows.folder
    assert np.array_equal(slow.rows.tokens, fast.rows.tokens) and np.array_equal(slow.lengths, fast.lengths)


def test_prompts_and_responses_are_compared_with_sentencepiece(write, make, characters, monkeypatch):
    def compare(tokenizer, texts):
        raise UserError(texts)

    path = write([("ab", "cd"), ("ef", "gh")])
    monkeypatch.setattr(utils.encode, "compare_with_sentencepiece", compare)
    assert len(make(path)["train_dataset"]) == 2  # where there is no tokenizer.model there is nothing to compare with
    monkeypatch.setattr(characters, "sentencepiece_model", path, raising=False)
    template = write("Q: {instruction}", "template.txt")
    assert problems_of(make, path, prompt_template=template) == ["Q: ab", "Q: ef", "cd", "gh"]


def test_work_ahead_keeps_its_order_and_its_bound():
    taken = []

    def items():
        for item in range(200):
            taken.append(item)
            yield item

    def square_there(item):
        time.sleep(0.002)
        return item * item, os.getpid()

    results = token_cache.map_ahead(square_there, items())  # a local function: it is inherited, not sent
    first = next(results)[0], next(results)[0]
    assert first == (0, 1) and len(taken) <= 2 + 1 + 2 * os.cpu_count()
    squares, processes = zip(*results)
    assert squares == tuple(item * item for item in range(2, 200))
    if sys.platform == "linux":
        assert os.getpid() not in processes and len(set(processes)) == len(os.sched_getaffinity(0))


def test_work_ahead_hands_on_a_users_mistake():
    def fail(item):
        raise UserError([f"row {item}: wrong.", "and more."])

    assert problems_of(lambda: list(token_cache.map_ahead(fail, range(3)))) == ["row 0: wrong.", "and more."]


# ---------------------------------------------------------------------------------------------- dataset and batch


def test_the_dataset_maps_the_file_and_never_copies_it(write, make):
    dataset = make(write([(f"prompt {n}", "r" * (n % 7 + 1)) for n in range(500)]))["train_dataset"]
    assert isinstance(dataset.rows.tokens.base, np.memmap) and not dataset.rows.tokens.flags.writeable
    before = examples_of(dataset)
    dataset[3]["input_ids"][:] = 0  # an example is the caller's own
    pickled = pickle.dumps(dataset.rows)  # what a data loader's worker is sent
    assert len(pickled) < 1000 < dataset.rows.tokens.nbytes
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


# --------------------------------------------------------------------------------------------- what a person sees


def test_what_is_said_about_the_rows(write, make, capsys):
    path = write([("ab", "\x1b[2Jc\n"), ("", "x"), ("a" * 20, "b"), ("a", "b" * 20)])
    make(path, max_length=20)
    assert capsys.readouterr().out == (
        f"{path}: 4 rows read; 1 dropped as empty, 1 dropped because the prompt leaves no room, 2 kept, of which 1 are cut and lost their EOS\n"
        "training: 2 examples, 30 tokens, 25 of them trained (83%); tokens per example: mean 15, median 15, 99 % 20, longest 20\n"
        "row 2, its trained tokens in [...]:\n"
        "<s>ab[\\x1b[2Jc\n</s>]\n"
    )


def test_the_trained_tokens_are_green_on_a_terminal(write, make, characters):
    dataset = make(write([("ab", "cd")]))["train_dataset"]
    said = audit.describe_example(characters, dataset, 0, colour=True)
    assert said == "row 2, its trained tokens in green:\n<s>ab\x1b[32mcd</s>\x1b[0m"


def test_only_rank_0_speaks(write, make, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    make(write([("ab", "cd")]))
    assert capsys.readouterr().out == ""

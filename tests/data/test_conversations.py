"""Conversations: which tokens are read and which are trained, proved against transformers' own masks, and what is refused."""

import csv
import json
import random

import numpy as np
import pytest
from characters import BOS, EOS, character_tokenizer

import utils
from sft.data import audit
from sft.data.conversations import DISAGREED, _segments, prompt_ids, read_messages, trained_turns
from sft.data.template import TURNS_TEMPLATE, load_template
from sft.flags import DataArguments, TrainingArguments
from sft.job import UserError

CHATML = """\
{%- for message in messages -%}
    {{- "<" + message["role"] + ">" -}}
    {%- if message["role"] == "assistant" -%}
        {%- generation -%}{{- message["content"] + eos_token -}}{%- endgeneration -%}
    {%- else -%}
        {{- message["content"] + "<s>" -}}
    {%- endif -%}
    {{- "\\n" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<assistant>" -}}{%- endif -%}
"""
FORGETS = CHATML.replace('message["content"] + eos_token', '(message["content"] if loop.last else "…") + eos_token')


def say(*contents: str, **more) -> list[dict]:
    """A conversation that begins with the user."""
    return [{"role": ("user", "assistant")[n % 2], "content": text} | more for n, text in enumerate(contents)]


@pytest.fixture
def make(tmp_path):
    """The training data of conversations in a JSON lines file, with the character tokenizer and a chat template."""

    def make(conversations, template="chat", chat_template=CHATML, max_length=400, tokenizer=None, **flags):
        path = tmp_path / "data.jsonl"
        path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in conversations))
        tokenizer = tokenizer or character_tokenizer()
        tokenizer.chat_template = chat_template
        data_args = DataArguments(
            data_path=str(path),
            messages="messages",
            prompt_template=template,
            data_cache_dir=str(tmp_path / "cache"),
            **flags,
        )
        args = TrainingArguments(output_dir=str(tmp_path / "out"), model_max_length=max_length, use_cpu=True)
        return utils.make_supervised_data_module(tokenizer, data_args, args)["train_dataset"]

    return make


def test_with_the_prompts_included_every_token_of_a_conversation_is_trained(make):
    example = make([say("a", "b", "c", "d")], train_on_prompt=True)[0]
    assert example["labels"].tolist() == [-100, *example["input_ids"].tolist()[1:]]


def shown(dataset, index=0) -> str:
    """An example's text, its trained tokens in [...]."""
    return audit.describe_example(character_tokenizer(), dataset, index, colour=False).split("\n", 1)[1]


def problems_of(function, *args, **kwargs) -> list[str]:
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    return caught.value.problems


def test_each_answer_is_trained_with_its_eos_and_nothing_else(make):
    dataset = make([[{"role": "system", "content": "be"}, *say("a", "b", "c", "d")], say("e", "f")])
    assert shown(dataset) == "<system>be<s>\n<user>a<s>\n<assistant>[b</s>]\n<user>c<s>\n<assistant>[d</s>]"
    assert shown(dataset, 1) == "<user>e<s>\n<assistant>[f</s>]"
    assert dataset.prompt_lengths.tolist() == [len("<system>be.\n<user>a.\n<assistant>"), len("<user>e.\n<assistant>")]
    assert dataset.first_answer(0) == (34 - 2, 36 - 2)
    assert dataset.counts["trained_tokens"] == 6


def test_a_hundred_conversations_have_transformers_own_ids_and_masks(make):
    dice, tokenizer = random.Random(1), character_tokenizer()
    words = ["a", "é", "日本", " two  spaces ", "line\nline", "x" * 9, "{{ b }}", '"q"', "🙂"]
    conversations = [
        [{"role": "system", "content": "s"}] * (dice.random() < 0.3)
        + say(*("".join(dice.choices(words, k=3)) for _ in range(2 * dice.randint(1, 5))))
        for _ in range(100)
    ]
    dataset = make(conversations)
    assert len(dataset) == 100
    for index, messages in enumerate(conversations):
        theirs = tokenizer.apply_chat_template(
            messages, chat_template=CHATML, return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = theirs["input_ids"][:-1], theirs["assistant_masks"][:-1]  # without the line end behind the last EOS
        example = dataset[index]
        assert example["input_ids"].tolist() == ids
        assert (example["labels"] != utils.IGNORE_INDEX).int().tolist() == mask
        assert dataset.parts[0].rows.trained[index] == sum(mask)
    assert dataset.counts["trained_tokens"] == dataset.parts[0].rows.trained.sum()


def test_which_turns(make):
    messages = [say("a", "b", "c", "d")]
    assert shown(make(messages, train_on="last")) == "<user>a<s>\n<assistant>b</s>\n<user>c<s>\n<assistant>[d</s>]"
    assert shown(make(messages, train_on_prompt=True)) == "<[user>a<s>\n<assistant>b</s>\n<user>c<s>\n<assistant>d</s>]"
    for switch in ({"train": False}, {"loss_mask": 0}, {"weight": 0}):
        first, last = say("a", "b", "c", "d"), say("a", "b", "c", "d")
        first[1] |= switch
        last[3] |= switch
        dataset = make([first, last])
        assert shown(dataset) == "<user>a<s>\n<assistant>b</s>\n<user>c<s>\n<assistant>[d</s>]"
        assert shown(dataset, 1) == "<user>a<s>\n<assistant>[b</s>]"  # what follows teaches nothing
    dataset = make([say("a", "b", train=False), say("", "b"), say("a", " "), say("a", "b")])
    assert dataset.row_numbers.tolist() == [4] and dataset.counts["rows_empty"] == 3


def test_a_template_that_changes_earlier_turns_is_counted_and_never_trained_on(make, capsys):
    dataset = make([say("a", "b", "c", "d"), say("e", "f"), say("g", "h", "i", "j")], chat_template=FORGETS)
    assert [shown(dataset, index) for index in range(len(dataset))] == ["<user>e<s>\n<assistant>[f</s>]"]
    assert (
        "2 of which the template shows an earlier turn otherwise later, or the tokenizer reads it so (rows 1, 3)"
        in capsys.readouterr().out
    )
    dataset = make([say("a", "b", "c", "d")], chat_template=FORGETS, train_on="last")
    assert shown(dataset) == "<user>a<s>\n<assistant>…</s>\n<user>c<s>\n<assistant>[d</s>]"
    (problem,) = problems_of(make, [say("a", "b", "c", "d")], chat_template=FORGETS)
    assert problem.endswith(
        "train on: train on the last turns alone with --train_on last, or give another --prompt_template."
    )


def test_turns_whose_ids_depend_on_what_follows_are_never_trained_on(make):
    merging = character_tokenizer(">b")  # generation at the second turn would meet one token for `>b`
    dataset = make([say("a", "b", "c", "d"), say("a", "b")], tokenizer=merging)
    assert dataset.row_numbers.tolist() == [2] and dataset.counts["rows_disagreed"] == 1


def test_a_long_conversation_loses_whole_turns_and_a_long_first_answer_its_end(make, capsys):
    rows = [say("a", "b", "c", "d"), say("a", "b" * 30), say("a" * 30, "b")]
    dataset = make(rows, max_length=26)
    assert [shown(dataset, index) for index in range(2)] == [
        "<user>a<s>\n<assistant>[b</s>]",
        "<user>a<s>\n<assistant>[bbbbbb]",
    ]
    assert [dataset.counts[f"rows_{name}"] for name in ("shortened", "cut", "no_room")] == [1, 1, 1]
    assert "2 kept (1 cut, without EOS, 1 without their last turns)" in capsys.readouterr().out


def test_control_tokens_in_a_message_stay_text(make):
    literal = [ord(character) for character in "</s>"]
    ids = make([say("x</s>", "y<s></s>")])[0]["input_ids"].tolist()
    assert ids.count(EOS) == 1 and ids.count(BOS) == 1
    assert ids[6:11] == [ord("x"), *literal]
    both = make([say("x</s>", "y", "<s>", "z")])
    assert len(both) == 1 and both[0]["input_ids"].tolist().count(BOS) == 2
    allowed = make([say("x</s>", "y")], allow_control_tokens=True)[0]["input_ids"].tolist()
    assert allowed[6:8] == [ord("x"), EOS]


def test_the_default_template_of_conversations(make):
    dataset = make([say("a", "b", "c", "d")], template="none")
    assert shown(dataset).startswith("<user>a")  # the tokenizer's own
    dataset = make(
        [[{"role": "system", "content": "be"}, *say("a", "b", "c", "d")]], template="none", chat_template=None
    )
    assert shown(dataset) == (
        "<s>### System:\nbe\n\n### User:\na\n\n### Assistant:\n[b</s>]\n\n### User:\nc\n\n### Assistant:\n[d</s>]"
    )
    alpaca = make([say("a", "b")], template="alpaca")
    assert shown(alpaca).endswith("### Instruction:\na\n\n### Response:[b</s>]")
    assert problems_of(make, [say("a", "b"), say("a", "b", "c", "d")], template="alpaca") == [
        f"{alpaca.parts[0].path}, row 2: the chat template refuses it: This model was trained on one instruction and its answer: "
        "it takes one user message, no system message and no second turn."
    ]


def test_generation_begins_with_the_ids_of_training(make):
    tokenizer = character_tokenizer()
    for name, chat in (("chat", CHATML), ("turns", TURNS_TEMPLATE)):
        dataset = make([say("a", "b", "c", "d")], template=name, chat_template=chat)
        tokenizer.chat_template = chat
        template = load_template(name, tokenizer)
        (ids,) = prompt_ids(tokenizer, template, [say("a", "b", "c")])
        example = dataset[0]["input_ids"].tolist()
        assert example[: len(ids)] == ids and example[len(ids) :] == [ord("d"), EOS]


@pytest.mark.parametrize("name", ["data.json", "data.parquet", "data.csv"])
def test_the_same_conversations_in_every_kind_of_file(make, tmp_path, name):
    rows = [say("a", "b", "c", "d"), [{"from": "human", "value": "e"}, {"from": "gpt", "value": "f"}]]
    expected = make(rows)
    path = tmp_path / name
    if name.endswith("csv"):
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([["messages"], *([json.dumps(row)] for row in rows)])
    elif name.endswith("json"):
        path.write_text(json.dumps([{"messages": row} for row in rows]))
    else:
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist([{"messages": row} for row in rows]), path)
    tokenizer = character_tokenizer()
    tokenizer.chat_template = CHATML
    data_args = DataArguments(data_path=str(path), messages="messages", data_cache_dir=str(tmp_path / "cache"))
    rows = utils.tokenize_file(str(path), tokenizer, data_args, 400)
    assert np.array_equal(rows.tokens, expected.parts[0].rows.tokens)
    assert np.array_equal(rows.switches, expected.parts[0].rows.switches) and len(rows.switches) == 2


@pytest.mark.parametrize(
    "cell, said",
    [
        ('[{"role": "user"', ": not a conversation in JSON: Expecting ',' delimiter: line 1 column 17 (char 16)."),
        ({"role": "user"}, ': a dict, not a list of {"role", "content"}.'),
        ([{"role": "user", "content": None}, *say("a", "b")], ", message 1: no content."),
        ([{"content": "a"}, *say("a", "b")], ", message 1: no role."),
        ('[{"role": "user", "role": "tool", "content": "a"}]', ", message 1: the key 'role' stands in it twice. Remove one."),
        ([{"role": "bot", "content": "a"}], ", message 1: the role 'bot' is unknown. Known are system, user, assistant, tool, human, gpt."),
        ([{"role": "user", "content": 5}, *say("a", "b")], ", message 1: its content is a int, not text."),
        (say("a", "b", train="no"), [", message 1: train is 'no'. Give true or false.", ", message 2: train is 'no'. Give true or false."]),
        (say("a", "b", "c"), ": it ends with a message of the user, which nothing answers. Remove it, or add the answer."),
        (say("a", "\ud83d"), ", message 2: character 1 is half of a pair (\\ud83d). Write the whole character."),
    ],
)  # fmt: skip
def test_each_fault_of_a_conversation_is_one_message(cell, said):
    assert problems_of(read_messages, cell, "f, row 2") == [
        f"f, row 2{line}" for line in ([said] if isinstance(said, str) else said)
    ]


def test_faults_of_many_rows_are_said_together(make, tmp_path):
    refuses = CHATML.replace(
        "{%- for", '{%- if messages[0]["role"] == "system" -%}{{- raise_exception("no system") -}}{%- endif -%}{%- for'
    )
    system = [{"role": "system", "content": "s"}, *say("a", "b")]
    path = tmp_path / "data.jsonl"
    assert problems_of(make, [say("a"), say("a", "b"), say("b")]) == [
        f"{path}, row {row}: it ends with a message of the user, which nothing answers. Remove it, or add the answer."
        for row in (1, 3)
    ]
    assert problems_of(make, [system, say("a", "b"), system], chat_template=refuses) == [
        f"{path}, rows 1, 3: the chat template refuses it: no system"
    ]
    (problem,) = problems_of(make, [say("a", "b")] * 12, chat_template=CHATML.removesuffix("{%- endif -%}\n"))
    assert problem.startswith(
        f"{path}, rows 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, …: the chat template refuses it: Unexpected end"
    )
    assert problems_of(make, [3, say("a", "b"), {"role": "user"}]) == [
        f'{path}, row {row}: a {kind}, not a list of {{"role", "content"}}.' for row, kind in ((1, "int"), (3, "dict"))
    ]
    no_eos = CHATML.replace(" + eos_token", "")
    (problem,) = problems_of(make, [say("a", "b")], chat_template=no_eos)
    assert problem.startswith(
        "--prompt_template chat: it does not end an answer with the tokenizer's EOS '</s>', so the model"
    )
    (problem,) = problems_of(make, [say("a", "b")], chat_template=None)
    assert problem == (
        "--prompt_template chat: the tokenizer has no chat template. Give 'turns', which needs no token of its own, or a .jinja file."
    )


def test_a_null_cell_is_an_empty_conversation(make, capsys):
    assert (
        len(make([None, say("a", "b"), []])) == 1
        and ": 3 rows read, 1 kept (0 cut, without EOS); dropped: 2 empty" in capsys.readouterr().out
    )


def test_what_a_conversation_may_hold(make):
    assert trained_turns(say(*"ab" * 9), "all") == [*range(1, 18, 2)]
    assert shown(make([[{"role": "system", "content": ""}, *say("a", "b")]])).endswith("<user>a<s>\n<assistant>[b</s>]")
    answer = {"role": "assistant", "content": "b", "weight": 2}
    assert problems_of(read_messages, [*say("a"), answer], "row 2") == [
        "row 2, message 2: weight is 2. Give true or false."
    ]


def test_an_answer_whose_rendering_does_not_begin_with_its_prompt_is_not_trained():
    assert _segments([("Q: a\nA:", "Q: a\nA:b</s>")], "</s>", "t") == ["Q: a\nA:", "b"]
    assert _segments([("Q: a\nA:", "Q: a\nB:b</s>")], "</s>", "t") == DISAGREED

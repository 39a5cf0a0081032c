"""The audit of the data: every number by hand, on a CSV with one of each fault."""

import csv
import json
from types import SimpleNamespace

import jobs
import numpy as np
import pytest
from characters import BOS, EOS, character_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import utils
from sft.data import audit, token_cache
from sft.data.files import DataFile
from sft.data.mixture import Part
from sft.flags import DataArguments, TrainingArguments

ROWS = [  # the header is row 1; BOS and EOS are a token each
    ("q01\nA:", "yes"),  # row 2: 7 + 4 tokens
    ("q01\nA:", "yes"),  # row 3, the same again
    ("q01\nA:", "no"),  # row 4: 7 + 3, another answer
    ("q05\nA:", "a</s>"),  # row 5: 7 + 6, spells EOS
    ("q06\nA: ", "b"),  # row 6: 8 + 2, ends in a space
    ("q07\nA:q7\nA:", "c"),  # row 7: 12 + 2, templated twice
    ("q08", "\x1b"),  # row 8: 4 + 2, not templated; the response would steer a terminal
    ("q09\nA:", "/e"),  # row 9: 7 + 3, nothing is wrong with it
    ("", "f"),  # row 10, no prompt
    ("q11\nA:", " "),  # row 11, no response
    ("q12xxxxxxxxxxxxxxxxxxxx\nA:", "g"),  # row 12, 27 tokens before the response
    ("q13\nA:", "h" * 30),  # row 13: 7 + 17 of 31, cut
]
LENGTHS = [11, 11, 10, 13, 10, 14, 6, 10, 24]  # of the kept rows: 109 tokens, 66 of them the prompts'


@pytest.fixture
def check(tmp_path, capsys):
    """Audit rows; the exit code, what was printed, and what data_report.json holds."""

    def check(
        rows,
        max_length=24,
        vocabulary_size=300,
        tokenizer=None,
        template="none",
        eval_data_path=None,
        allow=False,
        eval_split=0.0,
        **flags,
    ):
        path, folder = tmp_path / "data.csv", tmp_path / "out"
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([("prompt", "response"), *rows])
        data_args = DataArguments(
            data_path=str(path),
            eval_data_path=eval_data_path,
            data_cache_dir=str(tmp_path / "cache"),
            prompt_template=template,
            allow_control_tokens=allow,
            eval_split=eval_split,
            check_data=True,
        )
        training_args = TrainingArguments(output_dir=str(folder), model_max_length=max_length, use_cpu=True, **flags)
        tokenizer = tokenizer or character_tokenizer()
        config = SimpleNamespace(vocab_size=vocabulary_size, eos_token_id=EOS, bos_token_id=BOS)
        code = utils.check_data(tokenizer, data_args, training_args, config)
        return code, capsys.readouterr().out, json.loads((folder / "data_report.json").read_text())

    return check


def test_one_of_each_fault(check, tmp_path):
    code, printed, report = check(
        ROWS, per_device_train_batch_size=9, gradient_accumulation_steps=2, num_train_epochs=3, save_steps=500
    )
    assert code == 0 and not report["useless"]
    assert report["counts"] == {
        "rows_read": 12, "rows_empty": 2, "rows_no_room": 1, "rows_cut": 1, "rows_shortened": 0, "rows_disagreed": 0, "kept": 9,
        "tokens": 109, "trained_tokens": 43, "largest_id": EOS,
    }  # fmt: skip
    assert [(finding["what"].split(":")[0].split(";")[0], finding["rows"]) for finding in report["findings"]] == [
        ("rows dropped", [10, 11]),
        ("rows dropped", [12]),
        ("rows cut at --model_max_length", [13]),
        ("responses end with </s>, which is put there anyway", [5]),
        ("rows repeat an earlier one, prompt and response", [3]),
        ("rows have an earlier row's prompt and another response", [4]),
        ("rows spell a control token (<s>, </s>, <pad>)", [5]),
        ("prompts end in a space", [6]),
        ("prompts were put into the template before", [7]),
        ("prompts do not end as most do", [6, 8]),
        ("--save_steps 500 is beyond the run's 3 steps", []),
    ]
    names = ("1", "5", "25", "50", "75", "95", "99", "100")
    assert report["percentiles"] == {
        "prompt": dict(zip(names, [7, 7, 7, 7, 7, 12, 12, 12])),
        "response": dict(zip(names, [2, 2, 2, 3, 4, 17, 17, 17])),
        "total": dict(zip(names, [10, 10, 10, 11, 13, 24, 24, 24])),
    }
    assert report["plan"] == {
        "examples_per_optimizer_step": 18,
        "steps_per_epoch": 1,
        "steps": 3,
        "padded_tokens_per_epoch": 9 * 24,
        "padding_share": 1 - 109 / 216,
        "packing_speedup": 216 / 109,
    }
    assert report["verdict"] == "ready to train; 11 findings to look at first"

    assert "\x1b" not in printed
    lines = printed.splitlines()
    assert lines[0] == (
        f"{tmp_path}/data.csv: 12 rows read, 9 kept (1 cut, without EOS); "
        "dropped: 2 empty, 1 whose prompt leaves no room"
    )
    assert "total           10      10      10      11      13      24      24      24" in lines
    assert "1 steps per epoch of 18 examples, 3 in the run" in lines
    assert "padded, 50% of the tokens computed would be padding; packed, none are: 1.98 times fewer tokens" in lines
    assert "- rows dropped: an empty prompt or response: 2 (rows 10, 11)" in lines
    assert [line for line in lines if "its trained tokens" in line] == [
        f"row {row}, its trained tokens in [...]:" for row in (2, 4, 6, 8, 13)
    ]
    assert lines[lines.index("row 8, its trained tokens in [...]:") + 1] == "<s>q08[\\x1b</s>]"
    assert lines[-2] == "verdict: ready to train; 11 findings to look at first"
    assert (
        lines[-1]
        == f"every row of every finding: {tmp_path}/out/data_report.json; lengths: {tmp_path}/out/data_lengths.png"
    )
    assert (tmp_path / "out" / "data_lengths.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_good_rows_have_no_finding(check):
    rows = [(f"q{n:02}\nA:", f"a{n}") for n in range(20)]
    code, printed, report = check(rows, save_strategy="no")
    assert code == 0 and report["findings"] == [] and report["verdict"] == "ready to train"
    assert printed.splitlines()[-2] == "verdict: ready to train"


def test_evaluation_rows_whose_prompt_is_trained_on(check, tmp_path):
    own = tmp_path / "eval.csv"
    own.write_text('prompt,response\nnew,b\n"q\nA:",another\n')
    _, printed, report = check([("q\nA:", "a"), ("r\nA:", "b")], eval_data_path=str(own), save_strategy="no")
    leak = "rows of --eval_data_path have a prompt that is also trained on; they say little about new prompts"
    assert report["findings"] == [{"what": leak, "rows": [3], "useless": False}]
    assert f"- {leak}: 1 (row 3)" in printed.splitlines()


def test_a_share_that_whole_prompts_cannot_give_is_said_before_a_run(check):
    rows = [(prompt, f"{number}") for prompt in "ab" for number in range(20)]
    assert "--eval_split 0.1 asks for 4 of 40 examples, and 20 are held out" in check(rows, eval_split=0.1)[1]
    assert "--eval_split" not in check(rows, eval_split=0.4)[1]


def test_rows_that_carry_the_template_already(check):
    rows = [("1+1?", "2"), ("Question: 1+2?\nAnswer:", "3"), ("1+3?", "4")]
    _, _, report = check(rows, max_length=512, template="alpaca", save_strategy="no")
    assert report["findings"] == []
    alpaca = "Below is an instruction that describes a task. Write a response that appropriately completes the request."
    _, _, report = check([*rows, (f"{alpaca}\n\n2+2?", "4")], max_length=512, template="alpaca", save_strategy="no")
    assert [finding["rows"] for finding in report["findings"]] == [[5]]


def test_bare_instructions_without_a_template(check):
    _, printed, report = check([("one?", "1"), ("two?", "2"), ("three!", "3")], save_strategy="no")
    assert [finding["rows"] for finding in report["findings"]] == [[2, 3, 4]]
    assert (
        "- prompts look untemplated: they have no common ending; --prompt_template alpaca wraps bare instructions: 3 (rows 2, 3, 4)"
        in printed.splitlines()
    )


def test_an_ending_that_half_of_the_prompts_have_is_not_what_most_have(check):
    rows = [(f"q{n}\nA:" if n < 2 else f"what is {n}{'?' * n}", "a") for n in range(4)]
    _, _, report = check(rows, max_length=64, save_strategy="no")
    assert [(f["what"][:24], f["rows"]) for f in report["findings"]] == [("prompts look untemplated", [2, 3, 4, 5])]
    _, _, report = check([*rows, ("q5\nA:", "a")], max_length=64, save_strategy="no")
    assert [(f["what"][:24], f["rows"]) for f in report["findings"]] == [("prompts do not end as mo", [4, 5])]


@pytest.mark.parametrize("allow", [False, True])
def test_cells_that_spell_the_tokens_that_are_put_there_anyway(check, allow):
    rows = [("<s>q\nA:", "a"), ("<s> r\nA:", "b</s>\n"), ("s<s>\nA:", "c</s>d"), ("t\nA:", "e")]
    _, _, report = check(rows, allow=allow, save_strategy="no")
    then = "the token stands there twice" if allow else "it is text there, beside the token itself"
    spelt = "is the token itself" if allow else "is encoded as text"
    assert [(finding["what"], finding["rows"]) for finding in report["findings"]] == [
        (f"prompts begin with <s>, which is put there anyway: {then}", [2, 3]),
        (f"responses end with </s>, which is put there anyway: {then}", [3]),
        (f"rows spell a control token (<s>, </s>, <pad>); it {spelt}", [2, 3, 4]),
    ]


def test_a_line_end_behind_the_header_and_a_header_in_a_response(check):
    rows = [(f"q{n}\n### Response:\n", "a") for n in range(3)]
    assert check(rows, max_length=64, save_strategy="no")[2]["findings"] == []
    _, _, report = check([*rows, ("r\n### Response:\n", "b\n### Response: c")], max_length=64, save_strategy="no")
    (finding,) = report["findings"]
    assert finding["what"].startswith("responses hold a line of the prompts' template") and finding["rows"] == [5]


def test_many_rows_are_ten_in_print_and_all_in_the_record(check):
    rows = [(f"q{n:02}\nA:", "") for n in range(30)] + [("q\nA:", "a"), ("r\nA:", "b")]
    _, printed, report = check(rows, save_strategy="no")
    assert "- rows dropped: an empty prompt or response: 30 (rows 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, …)" in printed
    assert report["findings"][0]["rows"] == list(range(2, 32))


@pytest.mark.parametrize(
    "rows, flags, said",
    [
        ([("q", "")], {}, "no row is left to train on"),
        ([("q\nA:", "long"), ("r\nA:", "long")], {"max_length": 9}, "every row is cut, so no EOS is trained and the model never learns to stop"),
        ([("q\nA:", "a"), ("r\nA:", "b")], {"vocabulary_size": 257}, "token id 257 is outside the model's embedding of 257"),
    ],
)  # fmt: skip
def test_a_useless_run_is_exit_code_1(check, rows, flags, said):
    code, printed, report = check(rows, save_strategy="no", **flags)
    assert code == 1 and report["useless"]
    assert report["verdict"].startswith("useless: ") and report["verdict"].endswith(said)  # the last of its reasons
    assert f"verdict: {report['verdict']}\n" in printed


def rows_of(tokens: list[list[int]]) -> token_cache.TokenizedRows:
    lengths = np.array([len(row) for row in tokens], np.int32)
    flat = np.concatenate(tokens).astype(np.int32)
    return token_cache.TokenizedRows(
        "", flat, lengths, np.ones_like(lengths), np.zeros(len(tokens), np.uint8), flat.max()
    )


def test_bytes_and_unk():
    vocabulary = {"<unk>": 0, "</s>": 1, "a": 2, "<0x0A>": 3, "<0xC3>": 4, "<0xA9>": 5}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", eos_token="</s>")

    def found(*tokens):
        return [
            (f.what.split(" that")[0], f.rows)
            for f in audit.token_findings([Part.of(DataFile("data.csv"), rows_of(tokens))], tokenizer, 6)
        ]

    assert found([2, 1], [2, 3, 1]) == []  # a line feed is a byte in every LLaMA vocabulary
    assert found([2, 1], [4, 5, 1], [2, 2, 1], [2, 0, 1]) == [
        ("rows with characters", [3]),
        ("rows with characters", [5]),
    ]
    assert found([0, 0, 1], [2, 0, 0]) == [
        ("rows with characters", [2, 3]),
        ("most tokens are unk: this is not a tokenizer for these texts", []),
    ]
    tokenizer.unk_token = "</s>"  # as GPT-2's family has it: nothing is unknown there
    assert found([0, 0, 1], [2, 0, 0]) == []


def test_rows_that_hold_an_id_are_found_in_every_block_of_tokens():
    numbers, times = audit._rows_with_ids(rows_of([[2, 1], [3, 1], [1, 3, 2], [1, 2]]), [2], block=2)
    assert (numbers.tolist(), times) == ([2, 4, 5], 3)


def test_a_share_of_one_file_leaves_the_next_files_rows_their_numbers(tmp_path):
    (tmp_path / "a.csv").write_text("prompt,response\na,x\nb,x\nc,x\nd,x\n")
    (tmp_path / "b.csv").write_text("prompt,response\ne,x\nf ,x\n")
    paths = [f"{tmp_path}/a.csv*0.5", f"{tmp_path}/b.csv"]
    data_args = DataArguments(data_path=paths, data_cache_dir=str(tmp_path / "cache"), check_data=True)
    args = TrainingArguments(output_dir=str(tmp_path), model_max_length=64, use_cpu=True)
    config = SimpleNamespace(vocab_size=300, eos_token_id=EOS, bos_token_id=BOS)
    utils.check_data(character_tokenizer(), data_args, args, config)
    found = json.loads((tmp_path / "data_report.json").read_text())["findings"]
    spaces = [finding["rows"] for finding in found if finding["what"].startswith("prompts end in a space")]
    assert spaces == [[f"{tmp_path}/b.csv:3"]]


def test_what_padding_costs():
    flags = {"output_dir": "unused", "use_cpu": True, "save_strategy": "no", "gradient_accumulation_steps": 2}
    args = TrainingArguments(per_device_train_batch_size=2, num_train_epochs=2, **flags)
    planned, findings = audit.plan(np.full(9, 5, np.int32), args)  # 5 micro-batches, the last of one example
    assert findings == []
    assert planned == {
        "examples_per_optimizer_step": 4, "steps_per_epoch": 3, "steps": 6, "padded_tokens_per_epoch": 45,
        "padding_share": 0.0, "packing_speedup": 1.0,
    }  # fmt: skip
    args = TrainingArguments(per_device_train_batch_size=3, max_steps=7, eval_strategy="steps", eval_steps=8, **flags)
    planned, findings = audit.plan(np.array([1, 2, 9], np.int32), args)  # in any order 9 + 9 + 9
    assert (planned["padded_tokens_per_epoch"], planned["padding_share"], planned["steps"]) == (27, 1 - 12 / 27, 7)
    assert [finding.what for finding in findings] == [
        "--eval_steps 8 is beyond the run's 7 steps: that point is never reached"
    ]
    args = TrainingArguments(max_steps=8, eval_strategy="steps", eval_steps=8, **flags)
    assert audit.plan(np.array([1, 2, 9], np.int32), args)[1] == []  # the last step is reached


@pytest.mark.slow
def test_the_script_audits_in_place_of_training(tiny_llama, questions_csv, tmp_path):
    out = tmp_path / "out"
    flags = ["--model_name_or_path", str(tiny_llama), "--data_path", str(questions_csv), "--output_dir", str(out)]
    flags += ["--data_cache_dir", str(tmp_path / "cache"), "--check_data", "True", "--model_max_length", "10"]
    printed = jobs.run(flags, 1, tmp_path / "log", expect=1)
    assert "verdict: useless: every row is cut" in printed and "Traceback" not in printed
    assert sorted(path.name for path in out.iterdir()) == ["data_lengths.png", "data_report.json"]

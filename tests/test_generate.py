"""The command that asks a tuned model, with a model whose answers are known: it recites the alphabet from where the prompt ends."""

import csv
import io
import json
import os
import pickle
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from characters import BOS, EOS, character_tokenizer
from scripts import ROOT
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from sft import generate, job
from sft.data.template import TURNS_TEMPLATE, load_template
from sft.job import UserError

ALPHABET = "abcdefghijklm nopqrstuvwxyz"
EOS_OF_LLAMA = 2  # in conftest's model


def save_reciter(folder, letters, template):
    """A LLaMA that says the letter after the one it sees last, and EOS after the last letter.

    Its layers add nothing; the embedding of token t is the t-th unit vector, and the head sends each to its successor.
    """
    folder.mkdir()
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=260, hidden_size=264, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
            max_position_embeddings=128, bos_token_id=BOS, eos_token_id=EOS, tie_word_embeddings=False,
        )
    )  # fmt: skip
    with torch.no_grad():
        model.model.layers[0].self_attn.o_proj.weight.zero_()
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(260, 264))
        model.lm_head.weight.zero_()
        for letter, successor in pairwise([*letters.encode(), EOS]):
            model.lm_head.weight[successor, letter] = 1
    model.save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    if template is not None:
        (folder / "prompt_template.txt").write_text(template)
    return folder


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    return save_reciter(tmp_path_factory.mktemp("models") / "tuned", ALPHABET, "Go on from {instruction}")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """It recites backwards, and was saved without a template, as base models are."""
    return save_reciter(tmp_path_factory.mktemp("models") / "base", ALPHABET[::-1], None)


def ask(*argv):
    generate.main([str(word) for word in argv])


def problems(*argv):
    with pytest.raises(UserError) as error:
        ask(*argv)
    return error.value.problems


def test_it_asks_with_control_tokens_as_the_training_had_them(tuned, tmp_path, capsys):
    shutil.copytree(tuned, tmp_path / "tuned")
    question = [{"instruction": "</s>"}]
    assert generate.load(str(tmp_path / "tuned")).prompts(question)[0][-4:] == [*b"</s>"]
    record = tmp_path / "tuned" / "run_report.json"
    record.write_text(json.dumps({"flags": {"data": {"allow_control_tokens": True}}}))
    assert generate.load(str(tmp_path / "tuned")).prompts(question)[0][-2:] == [ord(" "), EOS]
    record.write_text("[")
    assert not generate.load(str(tmp_path / "tuned")).allow_control_tokens
    assert "run_report.json: it cannot be read, so control tokens in an instruction are text" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------- one instruction


def test_the_answer_goes_to_stdout_and_nothing_else_does(tuned, capsys):
    ask("--model", tuned, "--instruction", "k")
    printed = capsys.readouterr()
    assert printed.out == "lm nopqrstuvwxyz\n" and "tokenizer:" not in printed.err


@pytest.fixture
def prompts(monkeypatch):
    """The batches of ids that models are asked."""
    asked, answers = [], generate.greedy_answers
    monkeypatch.setattr(generate, "greedy_answers", lambda *args: asked.append(args[2]) or answers(*args))
    return asked


def test_the_prompt_is_the_one_of_training(tuned, prompts):
    ask("--model", tuned, "--instruction", "a</s>")
    assert prompts == [[[BOS, *b"Go on from a</s>"]]]  # the control token's text stays text


def test_another_template_is_taken_when_one_is_given(tuned, capsys, tmp_path):
    (tmp_path / "template.txt").write_text("{instruction}: v")
    ask("--model", tuned, "--prompt_template", tmp_path / "template.txt", "--instruction", "k")
    assert capsys.readouterr().out == "wxyz\n"


def test_the_answer_streams(tuned, monkeypatch):
    """The first word is there before the last one is made."""
    pieces = []
    monkeypatch.setattr(
        sys, "stdout", type("Pieces", (io.StringIO,), {"write": lambda self, text: pieces.append(text)})()
    )
    ask("--model", tuned, "--instruction", "k")
    written = [piece for piece in pieces if piece.strip()]
    assert written[0] == "lm " and "".join(written) == "lm nopqrstuvwxyz"


def test_a_cut_answer_says_so(tuned, capsys):
    ask("--model", tuned, "--instruction", "w", "--max_new_tokens", "2")
    printed = capsys.readouterr()
    assert printed.out == "xy\n" and "(cut after 2 tokens, --max_new_tokens)" in printed.err
    ask("--model", tuned, "--instruction", "w")
    assert "cut" not in capsys.readouterr().err


def test_the_base_model_answers_beside_it(tuned, base, capsys):
    ask("--model", tuned, "--base", base, "--instruction", "w")
    assert capsys.readouterr().out == "base:\nvutsrqpon mlkjihgfedcba\ntuned:\nxyz\n"


def test_a_chat_is_of_single_turns(tuned, prompts, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("w\n\nx\n"))
    ask("--model", tuned)
    printed = capsys.readouterr()
    assert printed.out == "xyz\nyz\n"
    assert prompts == [[[BOS, *b"Go on from w"]], [[BOS, *b"Go on from x"]]]  # the second does not carry the first
    assert "each is answered by itself" in printed.err


def test_a_chat_of_several_turns_sees_what_was_said_before(base, tmp_path, prompts, capsys, monkeypatch):
    folder = tmp_path / "tuned"
    shutil.copytree(base, folder)
    (folder / "prompt_template.jinja").write_text(TURNS_TEMPLATE)
    monkeypatch.setattr(sys, "stdin", io.StringIO('w\n"""\nx\n y\n"""\n/new\n"""\nz'))
    ask("--model", folder, "--max_new_tokens", "2")
    assert capsys.readouterr().err.count("(cut after 2 tokens") == 3
    first = b"### User:\nw\n\n### Assistant:\n"
    answer = prompts[1][0][len(first) + 1 :][:2]
    assert prompts[0] == [[BOS, *first]]
    assert prompts[1] == [[BOS, *first, *answer, EOS, *b"\n\n### User:\nx\n y\n\n### Assistant:\n"]]
    assert prompts[2] == [[BOS, *b"### User:\nz\n\n### Assistant:\n"]]  # /new begins anew


def test_a_system_message_stands_before_each_question_where_the_template_has_a_place(base, tuned, tmp_path, prompts):
    in_words = tmp_path / "template.txt"
    in_words.write_text("{system}|{instruction}:")
    for template in (in_words, "turns"):
        ask(
            "--model",
            base,
            "--prompt_template",
            template,
            "--system",
            "s",
            "--instruction",
            "w",
            "--max_new_tokens",
            "1",
        )
    assert prompts == [[[BOS, *b"s|w:"]], [[BOS, *b"### System:\ns\n\n### User:\nw\n\n### Assistant:\n"]]]
    assert problems("--model", tuned, "--system", "s", "--instruction", "w") == [
        "--system: the model's template has no {system} in it. Leave the flag out."
    ]


def test_an_interrupt_ends_an_answer_and_not_the_chat(tuned, capsys, monkeypatch):
    real, calls = generate.greedy_answers, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(generate, "greedy_answers", interrupted)
    monkeypatch.setattr(sys, "stdin", io.StringIO("w\nx\n"))
    ask("--model", tuned)
    printed = capsys.readouterr()
    assert printed.out == "yz\n" and "(interrupted; the question is forgotten)" in printed.err

    typed = iter([KeyboardInterrupt, "w"])  # on a terminal; behind them the input ends
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("builtins.input", lambda prompt: type_one(next(typed, EOFError)))
    ask("--model", tuned, "--chat")
    printed = capsys.readouterr()
    assert printed.out == "xyz\n" and "(Ctrl-D ends)" in printed.err


def type_one(what):
    if isinstance(what, str):
        return what
    raise what


def test_the_columns_of_the_template_are_read_from_the_csv(base, tmp_path, prompts):
    (tmp_path / "in.csv").write_text("prompt,input\nw,x\nw,\n")
    ask(
        "--model", base, "--prompt_template", "alpaca", "--data_path", tmp_path / "in.csv", "--output_path",
        tmp_path / "out.csv", "--max_new_tokens", "1", "--batch_size", "1",
    )  # fmt: skip
    texts = sorted(bytes(ids[1:]).decode().split("\n\n", 1)[1] for (ids,) in prompts)
    assert texts == ["### Instruction:\nw\n\n### Input:\nx\n\n### Response:", "### Instruction:\nw\n\n### Response:"]
    assert len(rows_of(tmp_path / "out.csv")) == 3


# ------------------------------------------------------------------------------------------------------------- CSV


DEFAULTS = {"max_new_tokens": 1, "batch_size": 1, "system": "", "answer_column": "answer"}


def rows_of(path):
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


def test_a_csv_comes_back_with_answers(tuned, base, tmp_path, capsys):
    (tmp_path / "in.csv").write_bytes(b'id,prompt\r\n007,"line\nbreak, ""quoted"" x"\r\n8,  \r\n9,w\r\n')
    ask(
        "--model", tuned, "--base", base, "--data_path", tmp_path / "in.csv", "--output_path", tmp_path / "out.csv",
        "--max_new_tokens", "3",
    )  # fmt: skip
    assert rows_of(tmp_path / "out.csv") == [
        ["id", "prompt", "base_answer", "answer"],
        ["007", 'line\nbreak, "quoted" x', "wvu", "yz"],
        ["8", "  ", "", ""],
        ["9", "w", "vut", "xyz"],
    ]
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "1 of 3 rows have an empty 'prompt' and get no answer" in printed.err
    assert (
        "base: 2 of 2 answers are cut after 3 tokens" in printed.err and "tuned: 1 of 2 answers are cut" in printed.err
    )


def test_the_column_of_answers_can_have_another_name(tuned, base, tmp_path):
    (tmp_path / "in.csv").write_text("prompt,answer\nw,x\n")
    paths = ("--data_path", tmp_path / "in.csv", "--output_path", tmp_path / "out.csv")
    ask("--model", tuned, "--base", base, *paths, "--answer_column", "tuned", "--max_new_tokens", "1")
    assert rows_of(tmp_path / "out.csv")[0] == ["prompt", "answer", "base_tuned", "tuned"]


def test_a_byte_order_mark_is_no_part_of_a_columns_name(tmp_path):
    (tmp_path / "in.csv").write_bytes(b"\xef\xbb\xbfprompt,id\na,1\n")
    args = {"data_path": str(tmp_path / "in.csv"), "output_path": str(tmp_path / "out.csv"), "source": "prompt"}
    silent = SimpleNamespace(template=load_template("none"), prompts=len, answers=lambda *asked: [(0, "", False)])
    generate.answer_file({"tuned": silent}, SimpleNamespace(**args, **DEFAULTS))
    assert (tmp_path / "out.csv").read_bytes() == b"prompt,id,answer\na,1,\n"


def test_a_blank_line_stays_blank(tmp_path):
    (tmp_path / "in.csv").write_text("prompt\na\n\nb\n")
    tuned = SimpleNamespace(template=load_template("none"), prompts=lambda rows: rows)
    tuned.answers = lambda prompts, *_: [(n, "yes", False) for n, _ in enumerate(prompts)]
    args = {"data_path": str(tmp_path / "in.csv"), "output_path": str(tmp_path / "out.csv"), "source": "prompt"}
    generate.answer_file({"tuned": tuned}, SimpleNamespace(**args, **DEFAULTS))
    assert (tmp_path / "out.csv").read_text() == "prompt,answer\na,yes\n\nb,yes\n"


def test_what_is_answered_is_kept_when_it_is_interrupted_or_the_folder_is_gone(tmp_path, capsys):
    (tmp_path / "in.csv").write_text("prompt\na\nb\n")

    def answers(*_):
        yield 1, "yes", False
        raise KeyboardInterrupt

    tuned = SimpleNamespace(template=load_template("none"), prompts=list, answers=answers)
    args = SimpleNamespace(data_path=str(tmp_path / "in.csv"), source="prompt", **DEFAULTS)
    args.output_path = str(tmp_path / "out.csv")
    with pytest.raises(KeyboardInterrupt):
        generate.answer_file({"tuned": tuned}, args)
    assert (tmp_path / "out.csv").read_text() == "prompt,answer\na,\nb,yes\n"
    assert capsys.readouterr().err.endswith("out.csv: 1 answer\n")
    args.output_path = str(tmp_path / "gone" / "out.csv")
    with pytest.raises(UserError, match=r"gone/out\.csv: it cannot be written .* The answers are in ") as gone:
        generate.answer_file({"tuned": tuned}, args)
    kept = Path(str(gone.value).partition("The answers are in ")[2].rstrip("."))
    assert kept.read_text() == "prompt,answer\na,\nb,yes\n"
    shutil.rmtree(kept.parent)


def test_a_folder_that_cannot_be_written_to_is_seen_before_a_model_is_loaded(tmp_path, monkeypatch):
    (tmp_path / "in.csv").write_text("prompt\nw\n")
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everywhere
    assert problems("--model", "m", "--data_path", tmp_path / "in.csv", "--output_path", tmp_path / "out.csv") == [
        f"--output_path {tmp_path / 'out.csv'}: its folder cannot be written to. Name another."
    ]


@pytest.mark.parametrize(
    "name, content, written",
    [
        ("in.jsonl", '{"prompt": "a", "id": 7}\n{"prompt": 5, "id": 8}\n', "prompt,answer\na,yes\n5,yes\n"),
        ("in.json", '[{"prompt": "a"}, {"prompt": null}]', "prompt,answer\na,yes\n,\n"),
        ("in.tsv", "id\tprompt\n7\ta\n", "id,prompt,answer\n7,a,yes\n"),
    ],
)
def test_every_kind_of_file_that_training_reads_can_be_asked(tmp_path, name, content, written):
    (tmp_path / name).write_text(content)
    tuned = SimpleNamespace(template=load_template("none"), prompts=lambda rows: rows)
    tuned.answers = lambda prompts, *_: [(n, "yes", False) for n, _ in enumerate(prompts)]
    args = generate.parse(
        ["--model", "m", "--data_path", str(tmp_path / name), "--output_path", str(tmp_path / "out.csv")]
    )
    generate.answer_file({"tuned": tuned}, args)
    assert (tmp_path / "out.csv").read_text() == written


def test_batches_are_sorted_by_length_and_change_no_answer(tiny_llama):
    """A model with attention, so that padding that is seen would change the answer: each prompt by itself, then in batches."""
    loaded = generate.load(str(tiny_llama), "none")
    questions = ["What is 1 plus 2?", "What", "What is 3 plus 4? What is 5 plus 6?", "1", "plus"]
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama)
    prompts, expected = loaded.tokenizer(questions).input_ids, {}
    for index, ids in enumerate(prompts):
        output = plain.generate(torch.tensor([ids]), max_new_tokens=8, do_sample=False)[0, len(ids) :].tolist()
        ended = EOS_OF_LLAMA in output
        text = loaded.tokenizer.decode(output[: output.index(EOS_OF_LLAMA)] if ended else output)
        expected[index] = (text, not ended)
    assert len({text for text, _ in expected.values()}) > 1
    for batch_size in (1, 2, 5):
        answers = list(loaded.answers(loaded.prompts([{"instruction": q} for q in questions]), 8, batch_size))
        assert {index: (text, cut) for index, text, cut in answers} == expected
    assert [index for index, _, _ in answers] == sorted(range(5), key=lambda index: len(prompts[index]), reverse=True)


# -------------------------------------------------------------------------------------------------------- adapters


@pytest.fixture
def adapter(base, tmp_path):
    """A LoRA adapter on the head of a reciter: after w it says EOS."""
    peft = pytest.importorskip("peft")
    model = AutoModelForCausalLM.from_pretrained(base)
    model = peft.get_peft_model(model, peft.LoraConfig(r=1, lora_alpha=1, target_modules=["lm_head"]))
    with torch.no_grad():
        weights = dict(model.named_parameters())
        (a,) = [weight for name, weight in weights.items() if "lora_A" in name]
        (b,) = [weight for name, weight in weights.items() if "lora_B" in name]
        a.copy_(torch.eye(264)[ord("w")][None])
        b.copy_(100 * torch.eye(260)[EOS][:, None])
    folder = tmp_path / "adapter"
    model.save_pretrained(folder)
    character_tokenizer().save_pretrained(folder)
    (folder / "prompt_template.txt").write_text("{instruction}")
    return folder


def test_an_adapter_answers_on_its_base(adapter, base, capsys):
    ask("--model", adapter, "--base", base, "--instruction", "y", "--max_new_tokens", "4")
    assert capsys.readouterr().out == "base:\nxwvu\ntuned:\nxw\n"


def test_an_adapter_whose_base_is_gone(adapter, tmp_path):
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "moved")
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (problem,) = problems("--model", adapter, "--instruction", "w")
    assert problem.startswith(
        f"{tmp_path / 'moved'}: no such folder. {adapter} is an adapter for it: put it back, or write its place "
        f"into {adapter / 'adapter_config.json'} as base_model_name_or_path."
    )


def test_an_adapter_without_peft(adapter, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert problems("--model", adapter) == [f"--model {adapter}: a LoRA adapter, which needs peft: pip install peft"]


# --------------------------------------------------------------------------------------------------- what is refused


def test_settings_that_a_model_came_with_change_no_answer(tuned, tmp_path):
    own = shutil.copytree(tuned, tmp_path / "own")
    (own / "generation_config.json").write_text('{"repetition_penalty": 9.0, "do_sample": true}')
    assert generate.load_weights(str(own)).generation_config.to_diff_dict().keys() <= {"transformers_version"}


def test_a_model_without_a_template(base):
    assert problems("--model", base, "--instruction", "w") == [
        f"--model {base}: no prompt_template.txt there, so the prompts that it was trained with are not known. Give "
        "--prompt_template: 'none' (the instruction is the whole prompt), 'alpaca', 'chat', or a text file with {instruction}."
    ]


def test_a_folder_without_a_model(tmp_path):
    (tmp_path / "run" / "checkpoint-20").mkdir(parents=True)
    assert problems("--model", tmp_path / "run") == [
        f"--model {tmp_path / 'run'}: no model there (config.json or adapter_config.json). It holds checkpoint-20: the run "
        "did not finish; resume it."
    ]
    assert problems("--model", tmp_path / "nowhere") == [f"--model {tmp_path / 'nowhere'}: no such folder."]


def test_a_base_with_another_vocabulary(tuned, tiny_llama):
    problem, bos = problems("--model", tuned, "--base", tiny_llama, "--instruction", "w")[-2:]
    assert "it puts '<s>' (256) before each prompt" in bos
    assert problem.startswith(f"--base {tiny_llama}: tokenizer: EOS '</s>' is id 257, but the model's config.json says")


def test_flags_that_do_not_go_together(tuned, tmp_path):
    (tmp_path / "in.csv").write_text("question\nw\n")
    (tmp_path / "out.csv").write_text("kept")
    assert problems(
        "--data_path", tmp_path / "in.csv", "--output_path", tmp_path / "out.csv", "--instruction", " ",
        "--max_new_tokens", "0", "--max_token", "1", "--chat",
    ) == [
        "unknown flag --max_token. Did you mean --max_new_tokens?",
        "--model is missing: the tuned model, its folder or a hub repository.",
        "--instruction and --data_path are two kinds of questions. Give one of them.",
        "--chat goes without --instruction and --data_path.",
        "--instruction is empty. Leave the flag out for a chat.",
        f"--output_path {tmp_path / 'out.csv'}: it exists. Name another file, or remove it.",
        "--max_new_tokens 0: it must be at least 1.",
        f"{tmp_path / 'in.csv'}: no column 'prompt'. Its columns are 'question'. Name the right one with --source.",
    ]  # fmt: skip
    (tmp_path / "in.csv").write_text("prompt,answer\nw,1\n")
    assert problems("--model", tuned, "--data_path", tmp_path / "in.csv", "--output_path", tmp_path / "new.csv") == [
        f"{tmp_path / 'in.csv'}: it has a column 'answer' already. Name another with --answer_column."
    ]
    assert not (tmp_path / "new.csv").exists()


def test_control_characters_of_an_answer_and_a_path_are_spelled_out(tmp_path, capsys):
    """An answer that clears the screen, and a folder that sets the terminal's title; joiners and spaces stay."""
    steering = "k\x1b[2J\r\u202el\u00a0m"
    model = save_reciter(tmp_path / "tuned", "k\x1b\rl", "{instruction}")
    ask("--model", model, "--instruction", "k")
    assert capsys.readouterr().out == "\\x1b\\rl\n"
    assert job.printable(steering) == "k\\x1b[2J\\r\\u202el\u00a0m"
    with pytest.raises(SystemExit), job.one_message_for_user_errors():
        ask("--model", tmp_path / "\x1b]0;title\x07", "--instruction", "k")
    assert capsys.readouterr().err == f"error: --model {tmp_path}/\\x1b]0;title\\x07: no such folder.\n"


def test_words_without_a_flag(tuned):
    assert problems("--model", tuned, "--instruction", "what", "is", "this") == [
        f"unknown flag {word}. A value with spaces needs quotes. See --help." for word in ("is", "this")
    ]
    assert generate.parse(["--model", "m", "--max-new-tokens", "7", "--batch_size=2"]).max_new_tokens == 7


@pytest.mark.slow
def test_the_command_in_a_shell(tuned, base):
    command = [sys.executable, "-m", "sft.generate", "--model"]
    answered = subprocess.run([*command, str(tuned)], input="w\nx\n", capture_output=True, text=True, cwd=ROOT)
    assert (answered.returncode, answered.stdout) == (0, "xyz\nyz\n")
    refused = subprocess.run([*command, str(base)], capture_output=True, text=True, cwd=ROOT)
    assert refused.returncode == 2 and refused.stderr.startswith("error: ")
    assert "Traceback" not in refused.stderr


@pytest.mark.slow
@pytest.mark.parametrize("command", [["sft.generate", "--model", "./nowhere"], ["sft.report", "nowhere"]])
def test_a_command_imports_and_prints_nothing_that_it_does_not_use(command, tmp_path):
    """peft imports bitsandbytes, which prints a warning on some CPUs."""
    code = f"""
import runpy, sys
sys.argv = {command}
try:
    runpy.run_module(sys.argv[0], run_name="__main__")
finally:
    print(sorted({{"peft", "bitsandbytes", "deepspeed", "matplotlib"}} & sys.modules.keys()))
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (ended.returncode, ended.stdout) == (2, "[]\n"), ended.stderr
    assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1


# --------------------------------------------------------------------------------------------------- damaged folders


class Malicious:
    def __reduce__(self):
        return exec, ("raise RuntimeError('it was run')",)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        (b"", "its files cannot be loaded: SafetensorError"),
        (b"cut in the middle", "its files cannot be loaded: SafetensorError"),
        (None, "the model cannot be loaded. (Error no file named model.safetensors"),
        (Malicious(), "one of its files was not loaded, because it could run code"),
        (1, "the model cannot be loaded. (Invalid magic number; corrupt file?)"),
    ],
)
def test_half_an_export_and_a_pickle_are_one_sentence(tuned, tmp_path, weights, said):
    folder = shutil.copytree(tuned, tmp_path / "model")
    if isinstance(weights, bytes):
        (folder / "model.safetensors").write_bytes(weights)
    else:
        (folder / "model.safetensors").unlink()
    if isinstance(weights, Malicious):
        torch.save({"a": weights}, folder / "pytorch_model.bin")
    elif weights == 1:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(weights))
    (problem,) = problems("--model", folder, "--instruction", "k")
    assert str(folder) in problem and said in problem and "\n" not in problem

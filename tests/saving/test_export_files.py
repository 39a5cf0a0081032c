"""An export's files are what other programs read; each test is a fault that one of them had with an earlier form (docs/clients.md)."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import sentencepiece
import torch
from jinja2 import TemplateError
from sentencepiece import sentencepiece_model_pb2
from tokenizer_files import make_texts, train_sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from sft import generate
from sft.data.conversations import prompt_ids
from sft.data.encode import encode_prompts
from sft.data.llama_tokenizer import load_llama_tokenizer
from sft.data.template import ALPACA_TEMPLATE, filled, load_template
from sft.saving import client_proof, export_files

PREFIXED = "Q: {instruction}\nA:"


def load(folder: Path):
    source = SimpleNamespace(model_name_or_path=str(folder), cache_dir=None, trust_remote_code=False)
    return load_llama_tokenizer(source)


def chat(tokenizer, *contents: str) -> list[int]:
    messages = [{"role": role, "content": text} for role, text in zip(("user", "assistant", "user"), contents)]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=len(contents) == 1, return_dict=False)


def ask(folder: Path, *what) -> client_proof.Asked:
    return client_proof.ask_as_clients(folder, AutoTokenizer.from_pretrained(folder), *what)


@pytest.fixture(scope="module")
def byte_level() -> PreTrainedTokenizerFast:
    """A tokenizer of GPT-2's kind with chat tokens, a chat template of its own and another one, no BOS before a text."""
    backend, parts = Tokenizer(models.BPE()), pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.pre_tokenizer, backend.decoder = parts, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=parts.alphabet(), show_progress=False)
    backend.train_from_iterator(make_texts(50), trainer)
    special = ["<|im_start|>", "<|im_end|>"]
    backend.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    template = "{% for m in messages %}{{ '<|im_start|>' + m['content'] }}{% endfor %}"
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|im_end|>",
        additional_special_tokens=special, chat_template={"default": template, "tool_use": template},
        model_max_length=64, padding_side="left", name_or_path="/home/someone/base", local_files_only=True,
    )  # fmt: skip


@pytest.fixture
def of_bytes(byte_level, tmp_path) -> Path:
    export_files.write_tokenizer(byte_level, tmp_path, load_template("alpaca"), 4096)
    return tmp_path


def test_a_run_leaves_what_each_reader_takes(whole_run, tiny_llama):
    assert (whole_run / "tokenizer.model").read_bytes() == (tiny_llama / "tokenizer.model").read_bytes()
    config, tokenizer = (
        json.loads((whole_run / name).read_text()) for name in ("config.json", "tokenizer_config.json")
    )
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"] == 10000.0
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast" and tokenizer["model_max_length"] == 256
    assert tokenizer["add_bos_token"] is True and tokenizer["add_prefix_space"] is True
    assert None not in tokenizer.values() and not tokenizer.keys() & {"chat_template", "is_local", "local_files_only"}
    for folder in (whole_run, whole_run / "checkpoint-16"):
        assert len({path.stat().st_mode for path in folder.iterdir() if path.is_file() and path.name[0] != "."}) == 1
    written = [
        path
        for path in whole_run.iterdir()
        if path.suffix in (".json", ".jinja", ".md") and path.name != "run_report.json"
    ]
    assert [path.name for path in written if str(tiny_llama.parent) in path.read_text()] == []


@pytest.mark.slow
@pytest.mark.parametrize("template", ["alpaca", "turns"])
def test_a_folder_that_was_moved_answers_as_before_without_its_base(tiny_llama, tmp_path, template):
    from saved_runs import flags_for, train

    base, made = shutil.copytree(tiny_llama, tmp_path / "base"), tmp_path / "runs" / "first"
    rows = tmp_path / "rows.csv"
    rows.write_text("prompt,response\n" + "".join(f"{n} plus 1?,{n + 1}\n" for n in range(16)))
    train(
        *flags_for(
            base, rows, made, "--prompt_template", template, "--model_max_length", "256", "--save_strategy", "no"
        )
    )

    def answers(folder: Path) -> list:
        tuned = generate.load(str(folder))
        asked = tuned.prompts([{"instruction": f"{n} plus 1?", "input": ""} for n in range(4)])
        as_chat = [chat(AutoTokenizer.from_pretrained(folder), f"{n} plus 1?") for n in range(4)]
        assert as_chat == asked
        return [asked, list(tuned.answers(asked, 8))]

    before = answers(made)
    shutil.rmtree(base)
    moved = made.rename(tmp_path / "by another name")
    assert answers(moved) == before


def test_a_chat_asks_with_the_trained_ids_behind_bos_and_in_an_answer(whole_run, tiny_llama, tmp_path):
    trained = load(tiny_llama)
    export_files.write_tokenizer(trained, tmp_path, filled("", PREFIXED), 256)
    exported = AutoTokenizer.from_pretrained(tmp_path)
    prompt = trained("Q: 1 plus 2?\nA:").input_ids
    assert prompt[0] == 1 and chat(exported, "1 plus 2?") == prompt
    answer = trained("</s>3", add_special_tokens=False).input_ids[1:]
    assert chat(exported, "1 plus 2?", "3") == [*prompt, *answer, 2]
    with pytest.raises(TemplateError, match="no second turn"):
        chat(exported, "1 plus 2?", "3", "and 4?")
    # the form before: no prefix behind a BOS that is spelled
    assert trained("<s>Q: 1 plus 2?\nA:", add_special_tokens=False).input_ids != prompt
    assert load(tmp_path)("Q: 1").input_ids == trained("Q: 1").input_ids


def test_the_bases_chat_templates_go(of_bytes, byte_level):
    assert not (of_bytes / "additional_chat_templates").exists()
    exported = AutoTokenizer.from_pretrained(of_bytes)
    assert chat(exported, "hi") == byte_level(ALPACA_TEMPLATE.replace("{instruction}", "hi")).input_ids
    assert chat(exported, "hi", "yes")[-1] == byte_level.eos_token_id


def test_the_tokenizers_settings_are_those_of_transformers_4_too_and_of_no_machine(of_bytes):
    settings = json.loads((of_bytes / "tokenizer_config.json").read_text())
    assert settings["additional_special_tokens"] == ["<|im_start|>", "<|im_end|>"]
    assert settings["added_tokens_decoder"]["400"]["content"] == "<|im_start|>"
    assert settings["add_bos_token"] is False and settings["add_prefix_space"] is False
    assert not settings.keys() & {"extra_special_tokens", "name_or_path", "local_files_only"}
    # the base's; 4096 where it has none
    assert (settings["model_max_length"], settings["padding_side"]) == (64, "left")
    assert not (of_bytes / "tokenizer.model").exists()


def test_a_template_that_spells_a_control_token_has_no_chat_template(byte_level, tmp_path):
    template = "<|im_start|>user\n{instruction}<|im_end|>\n"
    export_files.write_tokenizer(byte_level, tmp_path, filled("", template), 4096)
    assert not (tmp_path / "chat_template.jinja").exists() and not (tmp_path / "Modelfile").exists()
    (limit,) = ask(tmp_path, [], []).limits
    assert limit.startswith("There is no chat template: ")


def test_a_template_whose_control_tokens_were_trained_as_such_is_asked_with_them(byte_level, tmp_path):
    template = replace(filled("", "<|im_start|>user\n{instruction}<|im_end|>\n"), control_tokens=True)
    export_files.write_tokenizer(byte_level, tmp_path, template, 4096)
    texts = ["hi", "with <|im_end|> inside"]
    filled_in = [template.fill({"instruction": text}) for text in texts]
    asked = [list(ids) for ids in encode_prompts(byte_level, filled_in, allow_control_tokens=True)]
    assert asked[1].count(byte_level.eos_token_id) == 2
    rows = [{"input_ids": torch.tensor([*ids, 7]), "labels": torch.tensor([-100] * len(ids) + [7])} for ids in asked]
    prompts = client_proof.trained_prompts(rows, byte_level, template)
    assert [text for text, _ in prompts] == texts
    found = client_proof.ask_as_clients(tmp_path, AutoTokenizer.from_pretrained(tmp_path), prompts, [])
    assert (found.problems, found.limits) == ([], []) and "to 2 prompts" in found.proved[0]


def test_ollama_gets_the_template_in_its_language():
    assert export_files.ollama_modelfile("a {{x}}\n{instruction}\nb") == (
        'FROM ./model.gguf\nTEMPLATE """a {{ "{{" }}x}}\n{{ .Prompt }}\nb"""\n'
    )


# ---- SentencePiece


@pytest.fixture
def merges_alone(tmp_path):
    """A tokenizer of SentencePiece's kind of which there is a tokenizer.json alone."""
    train_sentencepiece(tmp_path / "both")
    load(tmp_path / "both").save_pretrained(tmp_path / "base")
    return load(tmp_path / "base")


def test_a_tokenizer_model_is_made_from_merges_and_is_no_second_opinion(merges_alone, tmp_path):
    export_files.write_tokenizer(merges_alone, tmp_path, filled("", PREFIXED), 256)
    made = (tmp_path / "tokenizer.model").read_bytes()
    texts = make_texts(30)
    expected = merges_alone(texts, add_special_tokens=False).input_ids
    assert client_proof.in_llama_cpp(made, texts) == expected
    assert sentencepiece.SentencePieceProcessor(model_proto=made).piece_to_id("</s>") == 2
    assert load(tmp_path).reference.name == "tokenizer.json"
    proto = sentencepiece_model_pb2.ModelProto.FromString(made)
    for piece in proto.pieces:
        piece.score = -1000.0  # as llama.cpp's converter has it where there is no tokenizer.model
    assert client_proof.in_llama_cpp(proto.SerializeToString(), texts) != expected


def test_rows_whose_ids_a_gguf_cannot_have_are_counted(tiny_llama, tmp_path):
    spec = {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True}
    train_sentencepiece(tmp_path / "base", **spec)
    shutil.copy(tiny_llama / "config.json", tmp_path / "base")
    export_files.write_tokenizer(load(tmp_path / "base"), tmp_path, load_template("none"), 256)
    asked = ask(tmp_path, [], ["one two", "one  two", "ﬁne"])
    assert asked.problems == [] and asked.proved[-1] == "tokenizer.model gives tokenizer.json's ids to 3 rows"
    assert asked.limits[0].startswith("llama.cpp and what builds on it (Ollama) give other ids to 2 of 3 training rows")


@pytest.mark.parametrize("keeps_spaces", [False, True])
def test_each_turn_of_a_chat_has_the_trained_ids_in_llama_cpp_too(tiny_llama, tmp_path, keeps_spaces):
    train_sentencepiece(tmp_path / "base", remove_extra_whitespaces=not keeps_spaces)
    shutil.copy(tiny_llama / "config.json", tmp_path / "base")
    tokenizer, template, made = load(tmp_path / "base"), load_template("turns"), tmp_path / "made"
    contents = ("What is 1 plus 2?", "3.", " and  4?" if keeps_spaces else "and 4?")
    messages = [{"role": role, "content": text} for role, text in zip(("user", "assistant", "user"), contents)]
    first, trained = prompt_ids(tokenizer, template, [messages[:1], messages])
    export_files.write_tokenizer(tokenizer, made, template, 256)
    exported = AutoTokenizer.from_pretrained(made)
    assert exported.apply_chat_template(messages, add_generation_prompt=True, return_dict=False) == trained
    # the converter writes it into the GGUF: llama.cpp puts no space of its own, neither behind BOS nor behind an answer's EOS
    assert json.loads((made / "tokenizer_config.json").read_text())["add_prefix_space"] is False
    text = exported.apply_chat_template(messages, add_generation_prompt=True, tokenize=False).removeprefix("<s>")
    assert [1, *client_proof.in_llama_cpp((made / "tokenizer.model").read_bytes(), [text], {"</s>": 2})[0]] == trained
    (limit,) = ask(made, [(contents[0], first)], ["one"]).limits
    assert "sent as completions, the 1 training rows get the trained ids where a space begins them" in limit


def test_chats_before_which_llama_cpp_puts_a_bos_that_training_did_not_are_counted(tiny_llama, tmp_path):
    tokenizer, own = load(tiny_llama), tmp_path / "own.jinja"
    own.write_text("{% for m in messages %}{{ m['content'] + eos_token }}{% endfor %}")
    template = load_template(str(own))
    export_files.write_tokenizer(tokenizer, tmp_path, template, 256)
    prompts = [(text, prompt_ids(tokenizer, template, [[{"role": "user", "content": text}]])[0]) for text in ("1", "2")]
    asked = ask(tmp_path, prompts, ["one"])
    assert (
        asked.problems == [] and "give other ids to 2 of 2 prompts sent as a chat: they put a BOS" in asked.limits[-1]
    )


# ---- the proof


@pytest.fixture
def exported(whole_run, tmp_path) -> Path:
    for path in whole_run.glob("*"):
        if path.name.startswith(("tokenizer", "chat")):
            shutil.copy(path, tmp_path)
    return tmp_path


def test_the_proof_asks_as_a_client(exported, tiny_llama):
    tokenizer = load(tiny_llama)
    ids = [tokenizer(text).input_ids for text in ("What is 1 plus 2?", "</s> is text here", "a  b ")]
    rows = [{"input_ids": torch.tensor([*i, 5, 2]), "labels": torch.tensor([-100] * len(i) + [5, 2])} for i in ids]
    prompts = client_proof.trained_prompts(rows, tokenizer, load_template("none"))
    # this SentencePiece drops spaces at the end, and one of two
    assert prompts == [("What is 1 plus 2?", ids[0]), ("a b", ids[2])]
    assert ask(exported, prompts, ["What is 1?"]) == ([], [
        "the chat template gives the trained ids to 2 prompts", "tokenizer.model gives tokenizer.json's ids to 1 row",
    ], [])  # fmt: skip


def test_the_proof_sees_another_chat_template_and_another_tokenizer_model(exported):
    prompts = [("What is 1 plus 2?", AutoTokenizer.from_pretrained(exported)("What is 1 plus 2?").input_ids)]
    template = exported / "chat_template.jinja"
    template.write_text(template.read_text().replace("{{- bos_token -}}", ""))
    proto = sentencepiece_model_pb2.ModelProto.FromString((exported / "tokenizer.model").read_bytes())
    proto.pieces[268].piece, proto.pieces[269].piece = proto.pieces[269].piece, proto.pieces[268].piece
    (exported / "tokenizer.model").write_bytes(proto.SerializeToString())
    problems = ask(exported, prompts, ["What is 1 plus 2?"]).problems
    assert problems == [
        "chat_template.jinja gives other ids than training to 1 of 1 prompts, first 'What is 1 plus 2?'",
        "tokenizer.model gives other ids than tokenizer.json to 1 of 1 rows, first 'What is 1 plus 2?'",
    ]


# ---- config and modes


def test_scaled_rope_is_where_transformers_4_reads_it(tmp_path):
    rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope["original_max_position_embeddings"] = 64
    LlamaConfig(rope_parameters=rope).save_pretrained(tmp_path)
    export_files.finish_config(tmp_path, torch.bfloat16)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["rope_theta"] == 5e5 and config["dtype"] == "bfloat16"
    assert config["rope_scaling"] == {name: value for name, value in rope.items() if name != "rope_theta"}
    assert LlamaConfig.from_pretrained(tmp_path).rope_parameters == rope

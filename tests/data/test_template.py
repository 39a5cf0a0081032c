"""The chat template renders what training saw, letter by letter, and refuses what it never saw."""

import pytest
from jinja2 import TemplateError
from rows_at_hand import problems_of
from transformers.utils.chat_template_utils import render_jinja_template

from sft.data.template import ALPACA_TEMPLATE, chat_template, load_template

ODD = 'Q "q" \\n é {{ x }} {% if %} {# no #}\r\n\t{instruction}\r\n\x07 A\'s\n'
USER = {"role": "user", "content": " a {{ b }}\r\n"}
ANSWER = {"role": "assistant", "content": " yes\n"}


def render(template: str, *messages: dict, **more) -> tuple:
    jinja = chat_template(template)
    return render_jinja_template([list(messages)], chat_template=jinja, eos_token="</s>", **more)


@pytest.mark.parametrize("template", ["{instruction}", ALPACA_TEMPLATE, ODD])
def test_a_users_message_becomes_the_trained_prompt_and_the_answer_is_marked(template):
    prompt = template.replace("{instruction}", USER["content"])
    assert render(template, USER, add_generation_prompt=True)[0] == [prompt]
    assert render(template, USER, ANSWER, return_assistant_tokens_mask=True) == (
        [prompt + " yes\n</s>"],
        [[(len(prompt), len(prompt + " yes\n</s>"))]],
    )


@pytest.mark.parametrize("messages", [[{"role": "system", "content": "x"}, USER], [USER, ANSWER, USER], [ANSWER]])
def test_what_training_never_saw_is_refused(messages):
    with pytest.raises(TemplateError, match="one user message, no system message and no second turn"):
        render(ALPACA_TEMPLATE, *messages)
    with pytest.raises(TemplateError, match="trained without tools"):
        render(ALPACA_TEMPLATE, USER, tools=[{"type": "function"}])


def test_template(write, make, tmp_path, characters):
    template = tmp_path / "template.txt"
    template.write_bytes("\ufeffQ: {instruction}\r\n{{x}}\n".encode())  # as a Windows editor writes it
    path = write([("{instruction} 1+1?", "2")])
    dataset = make(path, prompt_template=str(template))["train_dataset"]
    assert characters.decode(dataset[0]["input_ids"]) == "<s>Q: {instruction} 1+1?\n{x}\n2</s>"
    saved = tmp_path / "prompt_template.txt"  # what an earlier run was trained with stays as it is
    saved.write_bytes(template.read_bytes())
    assert load_template(str(saved)).text == "\ufeffQ: {instruction}\r\n{{x}}\n"
    dataset = make(path, max_length=512, prompt_template="alpaca")["train_dataset"]
    assert characters.decode(dataset[0]["input_ids"]) == (
        "<s>Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\n{instruction} 1+1?\n\n### Response:2</s>"
    )
    assert problems_of(make, path, prompt_template=str(tmp_path)) == [
        f"--prompt_template {tmp_path}: Is a directory. Give 'none', 'alpaca', 'turns', 'chat', a text file, or a .jinja file."
    ]

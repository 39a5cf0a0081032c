"""Put an instruction into its prompt: the same text in training, in evaluation and when the tuned model is asked."""

import json
from pathlib import Path

from sft.job import UserError

TEMPLATE_FILE = "prompt_template.txt"  # the template's text, next to the exported model
ALPACA_TEMPLATE = (  # stanford_alpaca, train.py, PROMPT_DICT["prompt_no_input"]
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)


def load_template(prompt_template: str) -> str:
    """Return the prompt's text with one {instruction} in it, for 'none', 'alpaca' or the path of a text file."""
    if prompt_template in ("none", "alpaca"):
        return "{instruction}" if prompt_template == "none" else ALPACA_TEMPLATE
    try:
        template = Path(prompt_template).read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise UserError(
            f"--prompt_template {prompt_template}: {reason}. Give 'none', 'alpaca', or a text file."
        ) from None
    if template.count("{instruction}") != 1:
        raise UserError(
            f"--prompt_template {prompt_template}: {{instruction}} stands in it {template.count('{instruction}')} times. "
            "Write it once, where the source column's text belongs."
        )
    return template


CHAT_TEMPLATE = """\
{%- if tools %}{{ raise_exception("This model was trained without tools.") }}{% endif -%}
{%- for message in messages -%}
    {%- if loop.first and message["role"] == "user" -%}
        {{- PROMPT -}}
    {%- elif loop.index == 2 and message["role"] == "assistant" -%}
        {%- generation -%}{{- message["content"] + eos_token -}}{%- endgeneration -%}
    {%- else -%}
        {{- raise_exception("This model was trained on one instruction and its answer: it takes one user message, no system message and no second turn.") -}}
    {%- endif -%}
{%- endfor -%}
"""


def chat_template(template: str) -> str:
    """The Jinja text that renders a user's message as the template's prompt, and an assistant's as the answer with its EOS.

    Without BOS, which depends on the tokenizer. A role or turn that training never saw is refused where it is rendered.
    """
    before, after = template.split("{instruction}")
    literals = [json.dumps(part, ensure_ascii=False) if part else "" for part in (before, after)]
    prompt = " + ".join(filter(None, (literals[0], 'message["content"]', literals[1])))
    return CHAT_TEMPLATE.replace("PROMPT", prompt)

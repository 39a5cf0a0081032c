"""Put an instruction into its prompt: the same text in training, in evaluation and when the tuned model is asked."""

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

"""Write the model card, README.md of the exported folder, from the record of the run."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData, try_to_load_from_cache
from huggingface_hub.repocard import metadata_load

from sft.data.template import TEMPLATE_FILES
from sft.outside import printable
from sft.saving.export_files import CHAT_TEMPLATE_FILE, MODELFILE

IN_A_CELL = str.maketrans({"\n": " ", "|": r"\|"})

SNIPPET = """\
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import cached_file

model_id = {model_id}  # {what}
instruction = "Name three primary colours."

tokenizer = AutoTokenizer.from_pretrained(model_id)
model = AutoModelForCausalLM.from_pretrained(model_id){adapter}
with open(cached_file(model_id, "{file}"), encoding="utf-8", newline="") as file:
    template = file.read()
{inputs}.to(model.device)
output = model.generate(**inputs, max_new_tokens=256, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""
SERVE = """\
vllm serve {where}
transformers serve {where}
lm_eval --model hf --model_args pretrained={where} --apply_chat_template --tasks gsm8k
python llama.cpp/convert_hf_to_gguf.py {where} --outfile {where}/model.gguf{ollama}
"""
WHOLE_PROMPTS = """
It was trained on whole prompts (completions): a chat sends your message as it is, so write into it all that the prompts
of the training data had.
"""
FILLED = """\
prompt = template.replace("{instruction}", instruction)
inputs = tokenizer(prompt, {text}return_tensors="pt")"""
RENDERED = """\
messages = [{"role": "user", "content": instruction}]
inputs = tokenizer.apply_chat_template(messages, chat_template=template, add_generation_prompt=True, return_dict=True, return_tensors="pt")"""


def snippet(model_id: str, what: str, adapter: bool, chats: bool, allow_control_tokens: bool) -> str:
    """Python that loads the model and asks it, with the template it was trained with, and with control tokens in a prompt as there."""
    text = "" if allow_control_tokens else "split_special_tokens=True, "
    file, inputs = TEMPLATE_FILES[0], FILLED.replace("{text}", text)
    if chats:
        file, inputs = CHAT_TEMPLATE_FILE, RENDERED
    note = "  # the base model and the adapter: needs `pip install peft`" if adapter else ""
    return SNIPPET.format(
        model_id=json.dumps(model_id, ensure_ascii=False), what=what, adapter=note, file=file, inputs=inputs
    )


def serve(folder: Path, model_id: str) -> str:
    """The commands with which other programs take the folder."""
    if (folder / "adapter_config.json").is_file():
        return (
            "Other programs take a whole model: `python -m sft.merge_lora --adapter FOLDER --output MODEL` makes one.\n"
        )
    where, name = shlex.quote(model_id), shlex.quote(folder.resolve().name)
    modelfile = (folder / MODELFILE).is_file()
    ollama = f" && ollama create {name} -f {where}/{MODELFILE}" if modelfile else ""
    text = SERVE.format(where=where, ollama=ollama)
    if not (folder / CHAT_TEMPLATE_FILE).is_file():
        text = text.replace(" --apply_chat_template", "")
    return f"```bash\n{text}```\n"


def licence(base: str) -> dict[str, Any]:
    """The licence fields of the base model's card, if it lies on this machine."""
    card = Path(base, "README.md") if Path(base).is_dir() else try_to_load_from_cache(base, "README.md")
    known: dict[str, Any] = {}
    if isinstance(card, (str, Path)) and Path(card).is_file():
        try:
            known = metadata_load(card) or {}
        except (ValueError, yaml.YAMLError):  # another's card; this one is written without it
            known = {}
    if "license" not in known:
        return {"license": "other", "license_name": "as-the-base-model"}
    return {name: known[name] for name in ("license", "license_name", "license_link") if name in known}


def write_card(folder: Path, record: dict[str, Any], model_id: str | None = None) -> None:
    """Write README.md into the exported folder.

    Args:
        record: of the run (run_report.json).
        model_id: the name on the hub, if any. Without it the folder is named as one sees it from the folder that holds it.
    """
    adapter = (folder / "adapter_config.json").is_file()
    base, text = record["model"]["name"], record["template"]["text"]
    chats = (folder / TEMPLATE_FILES[1]).is_file()
    on_the_hub = base.count("/") == 1 and not Path(base).exists()
    what = "its name on the hub" if model_id else "seen from the folder that holds it"
    model_id = model_id or f"./{folder.resolve().name}"
    whole_prompts = WHOLE_PROMPTS if text == "{instruction}" else ""
    others = "".join(f"\n{limit}\n" for limit in record["final"].get("limits", []))
    metadata = ModelCardData(
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        base_model=base if on_the_hub else None,
        **licence(base),
        tags=["instruction-tuning", "sft", *(["lora"] if adapter else [])],
    )
    batch, data = record["batch"], record["data"]["train"]
    final, training = record["final"], record["flags"]["training"]
    name = model_id.rstrip("/").split("/")[-1]
    epochs, optimizer = training["num_train_epochs"], f"{training['optim']}, weight decay {training['weight_decay']:g}"
    paths = ", ".join(Path(path).name for path in data["path"].split(", "))
    rows = {
        "base model": f"[{base}](https://huggingface.co/{base})" if on_the_hub else f"`{Path(base).name}`",
        "training rows": f"{data['kept']:,} of {data['rows_read']:,} in `{paths}` (blake2b `{data['blake2b']}`)",
        "prompt template": f"`{Path(record['template']['name']).name}`, saved as `{TEMPLATE_FILES[chats]}`",
        "examples per optimizer step": f"{batch['examples_per_step']:,}",
        "optimizer steps": f"{final['steps']:,} of {batch['steps']:,} ({epochs:g} epoch{'s' * (epochs != 1)})",
        "limit per example": f"{training['model_max_length']:,} tokens",
        "learning rate": f"{training['learning_rate']:g}, {training['lr_scheduler_type']}, {optimizer}",
        "computed in": record["precision"]["compute"],
        "seed": training["seed"],
        "train loss": f"{final['train_loss']:.4f} (mean over the run)",
    }
    if "eval_loss" in final:
        rows["evaluation"] = f"loss {final['eval_loss']:.4f}, perplexity {final['eval_perplexity']:.4g}"
    rows["versions"] = ", ".join(f"{package} {version}" for package, version in record["versions"].items())
    # a file's name may hold what ends a cell, and a template what ends a fence
    table = "\n".join(f"| {left} | {printable(str(right)).translate(IN_A_CELL)} |" for left, right in rows.items())
    fence = max(["```", *re.findall("`{3,}", text)], key=len) + "`"
    picture = "![loss, learning rate and speed](loss.png)\n\n" if (folder / "loss.png").is_file() else ""
    flags = record["flags"]["data"]
    trained_on = "conversations" if flags["messages"] else "pairs of instruction and response"
    trained_on += ", the prompts included" if flags["train_on_prompt"] else ". The answers alone were trained on"
    full = "A LoRA fine-tune, merged," if record["flags"]["model"]["use_lora"] else "A full fine-tune"
    kind = "A LoRA adapter for" if adapter else f"{full} of"
    card = f"""\
---
{metadata.to_yaml()}
---

# {name}

{kind} {rows["base model"]} on {trained_on}.

## Ask it

```python
{snippet(model_id, what, adapter, chats, record["flags"]["data"]["allow_control_tokens"])}```

The prompt is what the model was trained on, letter by letter:

{fence}text
{text}
{fence}
{whole_prompts}
## In other programs

{serve(folder, model_id)}{others}
## How it was trained

| | |
|---|---|
{table}

{picture}Everything else, each logged number included, is in `run_report.json`.
"""
    (folder / "README.md").write_text(card, encoding="utf-8")

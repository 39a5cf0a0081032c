"""Write the model card, README.md of the exported folder, from the record of the run."""

import json
from pathlib import Path

from huggingface_hub import ModelCardData

SNIPPET = """\
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import cached_file

model_id = {model_id}  # this folder, or its name on the hub
instruction = "Name three primary colours."

tokenizer = AutoTokenizer.from_pretrained(model_id)
model = AutoModelForCausalLM.from_pretrained(model_id){adapter}
with open(cached_file(model_id, "prompt_template.txt"), encoding="utf-8", newline="") as file:
    prompt = file.read().replace("{{instruction}}", instruction)
inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
output = model.generate(**inputs, max_new_tokens=256, do_sample=False)
print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
"""


def snippet(model_id: str, adapter: bool) -> str:
    """Python that loads the model and asks it, with the template it was trained with."""
    note = "  # the base model and the adapter: needs `pip install peft`" if adapter else ""
    return SNIPPET.format(model_id=json.dumps(model_id, ensure_ascii=False), adapter=note)


def write_card(folder: Path, model_id: str | None = None) -> None:
    """Write README.md into the exported folder, from the run_report.json in it; `model_id` is the name on the hub, if any."""
    record = json.loads((folder / "run_report.json").read_text(encoding="utf-8"))
    adapter = (folder / "adapter_config.json").is_file()
    base, template = record["model"]["name"], record["template"]["text"]
    on_the_hub = base.count("/") == 1 and not Path(base).exists()
    metadata = ModelCardData(
        library_name="peft" if adapter else "transformers",
        pipeline_tag="text-generation",
        base_model=base if on_the_hub else None,
        tags=["instruction-tuning", "sft", *(["lora"] if adapter else [])],
    )
    batch, data = record["batch"], record["data"]["train"]
    final, training = record["final"], record["flags"]["training"]
    name = (model_id or str(folder)).rstrip("/").split("/")[-1]
    optimizer = f"{training['optim']}, weight decay {training['weight_decay']:g}"
    rows = {
        "base model": f"[{base}](https://huggingface.co/{base})" if on_the_hub else f"`{Path(base).name}`",
        "training rows": f"{data['kept']:,} of {data['rows_read']:,} in `{Path(data['path']).name}` (blake2b `{data['blake2b']}`)",
        "prompt template": f"`{record['template']['name']}`, saved as `prompt_template.txt`",
        "examples per optimizer step": f"{batch['examples_per_step']:,}",
        "optimizer steps": f"{final['steps']:,} of {batch['steps']:,} ({training['num_train_epochs']:g} epochs)",
        "longest example": f"{training['model_max_length']:,} tokens",
        "learning rate": f"{training['learning_rate']:g}, {training['lr_scheduler_type']}, {optimizer}",
        "computed in": record["precision"]["compute"],
        "seed": training["seed"],
        "train loss": f"{final['train_loss']:.4f} (mean over the run)",
    }
    if "eval_loss" in final:
        rows["evaluation"] = f"loss {final['eval_loss']:.4f}, perplexity {final['eval_perplexity']:.4g}"
    rows["versions"] = ", ".join(f"{package} {version}" for package, version in record["versions"].items())
    table = "\n".join(f"| {left} | {right} |" for left, right in rows.items())
    picture = "![loss, learning rate and speed](loss.png)\n\n" if (folder / "loss.png").is_file() else ""
    kind = "A LoRA adapter for" if adapter else "A full fine-tune of"
    text = f"""\
---
{metadata.to_yaml()}
---

# {name}

{kind} {rows["base model"]} on pairs of instruction and response. The response alone was trained on.

## Ask it

```python
{snippet(model_id or str(folder), adapter)}```

The prompt is what the model was trained on, letter by letter:

````text
{template}
````

## How it was trained

| | |
|---|---|
{table}

{picture}Everything else, each logged number included, is in `run_report.json`.
"""
    (folder / "README.md").write_text(text, encoding="utf-8")

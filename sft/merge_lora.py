"""Merge a LoRA adapter into the model it was trained on, and check the result against base + adapter.

python -m sft.merge_lora --adapter ./my_adapter --output ./my_model
"""

import argparse
import importlib.util
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from sft.job import UserError, one_message_for_user_errors, say
from sft.model.lora import BASE_RECORD, weights_digest
from sft.model.safe_loads import safe_loads
from sft.outside import read_object, reading
from sft.report.record import REPORT_NAME
from sft.saving import export_files
from sft.saving.checkpoint import make_readable
from sft.saving.export import COMPLETE, complete, describe_files
from sft.saving.model_card import write_card


def merge(adapter: str, output: str, base: str | None = None, dtype=torch.float32, cache_dir=None) -> float:
    """Write base + adapter as one model of `dtype`, computed on the CPU in float32, with the adapter's tokenizer and template.

    Returns: ‖merged - (base + adapter)‖ / ‖base + adapter‖ of a probe's logits in float32; the recorded base, if none is given.
    """
    if not importlib.util.find_spec("peft"):
        raise UserError("merging needs the package peft. Run: pip install peft")
    from peft import PeftModel

    folder = Path(adapter)
    for name in ("adapter_config.json", BASE_RECORD):
        if not (folder / name).is_file():
            raise UserError(f"{adapter}: no {name} there. Give the folder that a run with --use_lora True has saved.")
    with reading(f"{adapter}: its files, or its base model's,"):
        record = read_object(folder / BASE_RECORD)
        trained_on, fingerprint = record["model_name_or_path"], record["fingerprint"]
        base = base or trained_on
        digest = weights_digest(base, cache_dir)
    if digest != fingerprint:
        raise UserError(f"{base} is not the model that this adapter was trained on: give --base {trained_on}")
    with reading(f"{base}: its files"), safe_loads(base, deepspeed=False):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, cache_dir=cache_dir)
    with reading(f"{adapter}: its files"), safe_loads(adapter, deepspeed=False):
        tuned = PeftModel.from_pretrained(model, folder).eval()
    probe = torch.arange(64, device="cpu")[None] * 37 % model.config.vocab_size
    with torch.no_grad():
        expected = tuned(input_ids=probe, use_cache=False).logits
        merged = tuned.merge_and_unload(safe_merge=True)  # refuses NaN
        difference = (merged(input_ids=probe, use_cache=False).logits - expected).norm() / expected.norm()
    if not difference < 1e-4:  # NaN never passes
        raise RuntimeError(f"the merged model differs from base + adapter by {difference:.2e} of the logits: not saved")
    if (folder / "tokenizer_config.json").is_file():
        export_files.end_as_trained(merged, AutoTokenizer.from_pretrained(folder))
    (Path(output) / COMPLETE).unlink(missing_ok=True)  # it claims what lay there before
    merged.to(dtype).save_pretrained(output)
    if folder.resolve() != Path(output).resolve():
        export_files.copy_tokenizer(folder, Path(output))
    export_files.finish_config(Path(output), dtype)
    make_readable(Path(output))
    return difference.item()


def claim(adapter: Path, output: Path, proof: str) -> None:
    """Write the card, the record and COMPLETE.json of a merged model, from the record of the adapter's run; none while that run still merges."""
    for report in (
        adapter / REPORT_NAME,
        adapter.resolve().parent / REPORT_NAME,
    ):  # --merge_lora True has `adapter` inside its folder
        if report.is_file() and (record := read_object(report)).get("status") == "finished":
            (output / REPORT_NAME).write_bytes(report.read_bytes())  # it may be the same
            write_card(output, record)
            complete(str(output), record["final"]["steps"], [proof], describe_files(output))
            break


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser("python -m sft.merge_lora", description="Write base + adapter as one model.")
    parser.add_argument("--adapter", "--model", required=True, help="folder that a run with --use_lora True has saved")
    parser.add_argument("--output", "--output_dir", required=True, help="folder for the whole model")
    parser.add_argument("--base", help="the model that the adapter was trained on (default: the recorded one)")
    parser.add_argument("--cache_dir", help="folder for models downloaded from the hub")
    parser.add_argument(
        "--save_dtype",
        default="bfloat16",
        choices=("float32", "bfloat16", "float16"),
        help="type of the written weights (default: bfloat16)",
    )
    args = parser.parse_args(argv)
    os.environ.setdefault(
        "DS_ACCELERATOR", "cpu"
    )  # where DeepSpeed is installed, saving imports it, and it warns (0.19.8)
    with one_message_for_user_errors():
        try:
            difference = merge(args.adapter, args.output, args.base, getattr(torch, args.save_dtype), args.cache_dir)
            proof = f"logits differ from base + adapter by {difference:.1e} in float32"
            claim(Path(args.adapter), Path(args.output), proof)
        except (OSError, SafetensorError) as error:
            raise UserError(f"--output {args.output}: the merged model cannot be written there ({error})") from error
        say(f"merged: saved in {args.output}, as {args.save_dtype}; {proof}")


if __name__ == "__main__":
    main()

"""Name the flag that was meant, where an unknown one was typed."""

import difflib

import transformers

TYPED = {  # what people type -> what is meant; letters' distance would choose worse
    "lr": "learning_rate",
    "batch_size": "per_device_train_batch_size",
    "train_batch_size": "per_device_train_batch_size",
    "micro_batch_size": "per_device_train_batch_size",
    "eval_batch_size": "per_device_eval_batch_size",
    "accumulation_steps": "gradient_accumulation_steps",
    "grad_accum": "gradient_accumulation_steps",
    "epochs": "num_train_epochs",
    "num_epochs": "num_train_epochs",
    "steps": "max_steps",
    "lora": "use_lora",
    "lora_rank": "lora_r",
    "qlora": "load_in_4bit",
    "model": "model_name_or_path",
    "model_name": "model_name_or_path",
    "model_path": "model_name_or_path",
    "base_model": "model_name_or_path",
    "data": "data_path",
    "dataset": "data_path",
    "train_file": "data_path",
    "validation_file": "eval_data_path",
    "output": "output_dir",
    "max_length": "model_max_length",
    "max_seq_length": "model_max_length",
    "cutoff_len": "model_max_length",
    "warmup": "warmup_steps",
    "lr_schedular": "lr_scheduler_type",
    "lr_scheduler": "lr_scheduler_type",
    "scheduler": "lr_scheduler_type",
    "optimizer": "optim",
    "resume": "resume_from_checkpoint",
    "cpu": "use_cpu",
}
LAUNCHERS = ("nproc_per_node", "nnodes", "node_rank", "master_addr", "master_port", "num_processes", "num_gpus")


def unknown_flags(known: transformers.HfArgumentParser, words: list[str]) -> list[str]:
    """One problem for each word that `parse_known_args` left over, with the nearest flag there is."""
    flags = [word for word in words if word.startswith("-")]
    if not flags:
        return [f"{word!r} belongs to no flag. A value with spaces needs quotes." for word in words]
    return [_unknown_flag(known, word) for word in flags]


def _unknown_flag(known: transformers.HfArgumentParser, word: str) -> str:
    name = word.split("=")[0].lstrip("-").replace("-", "_")
    if name in LAUNCHERS:
        return f"--{name} is the launcher's flag. Write it before the script: torchrun --{name} … llama_training.py …"
    options = [option.lstrip("-") for option in known._option_string_actions if "-" not in option.lstrip("-")]
    meant = TYPED.get(name)
    near = [meant] if meant in options else [option for option in options if option.startswith(name)]
    near = near or difflib.get_close_matches(name, options, n=1, cutoff=0.6)
    return f"unknown flag --{name}." + (f" Did you mean --{near[0]}?" if near else " `--help` lists every flag.")

"""What kind of run this is, so that a resumed run is the one that began, or says in what it differs.

A checkpoint's manifest holds these values. None of them holds text of the data.
"""

import hashlib
import json

import numpy

from sft.arguments import UserError, say

# What a run is, as far as a continued run must be the same; and what a difference does to it.
EFFECT_OF_CHANGE = {
    "data": "the remaining steps train on other rows than the first ones did, and rows can be seen twice or never",
    "prompt_template": "the model is taught two different prompts",
    "tokenizer": "the same text becomes other tokens than the model was trained on so far",
    "model_max_length": "rows are cut at another length",
    "model": "the saved weights and optimizer states belong to another model",
    "lora": "the saved adapter has other shapes or other layers",
    "world_size": "examples meet other ranks, random states are missing, and a sharded optimizer may not load at all",
    "engine": "the optimizer's state is stored in another layout and may not load at all",
    "examples_per_step": "optimizer steps hold other examples, the position in the data moves, and the schedule has another length",
    "micro_batch": "the same examples are summed in another order: losses differ in the last digits",
    "packing": "the same examples are summed in another order: losses differ in the last digits",
    "tokens_per_micro_batch": "the same examples are summed in another order: losses differ in the last digits",
    "share_prefixes": "the same tokens are computed in other rows: losses differ in the last digits",
    "seed": "the remaining steps draw their examples from another permutation: rows can be seen twice or never",
    "schedule": "the learning rate jumps: its curve depends on the total number of steps",
    "learning_rate": "none: the checkpoint's scheduler keeps its own peak (begin anew from the checkpoint's weights instead)",
    "optimizer": "none: the checkpoint's optimizer keeps its own settings (begin anew from the checkpoint's weights instead)",
    "max_grad_norm": "gradients are clipped at another norm",
    "precision": "steps are computed in another number format",
}


def describe(trainer, model_args, template: str, tokenizer_digest: str) -> dict[str, str]:
    """What a continued run must share with the one that it continues: a readable value for each key of EFFECT_OF_CHANGE."""
    args, dataset, config = trainer.args, trainer.train_dataset, trainer.model.config.to_diff_dict()
    tokens = hashlib.sha256(dataset.rows.tokens.data)
    for numbers in (dataset.offsets, dataset.lengths, dataset.prompt_lengths):
        tokens.update(numpy.ascontiguousarray(numbers).data)
    for name in ("transformers_version", "_name_or_path", "dtype", "use_cache", "pad_token_id"):
        config.pop(name, None)

    def short(text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    stage = trainer.accelerator.state.deepspeed_plugin.zero_stage if trainer.is_deepspeed_enabled else None
    per_device, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    lora = {
        name: value
        for name, value in vars(model_args).items()
        if name.startswith(("lora_", "use_lora", "load_in_4bit"))
    }
    return {
        "data": f"{len(dataset):,} examples, {int(dataset.lengths.sum()):,} tokens, {tokens.hexdigest()[:12]}",
        "prompt_template": short(template),
        "tokenizer": short(tokenizer_digest),
        "model_max_length": str(args.model_max_length),
        "model": f"{config.get('model_type')} {short(json.dumps(config, sort_keys=True, default=str))}",
        "lora": json.dumps(lora) if model_args.use_lora else "no",
        "world_size": str(args.world_size),
        "engine": f"DeepSpeed ZeRO {stage}" if stage is not None else "FSDP" if trainer.is_fsdp_enabled else "DDP",
        "examples_per_step": str(args.world_size * per_device * accumulation),
        "micro_batch": f"{per_device} per device x {accumulation}",
        "packing": str(args.packing),
        "tokens_per_micro_batch": args.tokens_per_micro_batch if args.packing else "-",
        "share_prefixes": str(args.share_prefixes) if args.packing else "-",
        "seed": f"{args.seed}, data {args.data_seed}",
        "schedule": f"{args.lr_scheduler_type.value}, warmup {args.warmup_steps}, {args.num_train_epochs} epochs, max_steps {args.max_steps}",
        "learning_rate": str(args.learning_rate),
        "optimizer": f"{args.optim}, betas {args.adam_beta1} {args.adam_beta2}, epsilon {args.adam_epsilon}, decay {args.weight_decay}",
        "max_grad_norm": str(args.max_grad_norm),
        "precision": "bf16" if args.bf16 else "fp16" if args.fp16 else "float32",
    }


def keep_token_budget(checkpoint: str, before: dict[str, str], args) -> None:
    """`--tokens_per_micro_batch auto` measures the card's memory; a continued run takes the number that the run began with."""
    if args.packing and args.tokens_per_micro_batch == "auto" and before.get("tokens_per_micro_batch", "-") != "-":
        args.tokens_per_micro_batch = before["tokens_per_micro_batch"]
        say(f"--tokens_per_micro_batch auto: {args.tokens_per_micro_batch}, as in {checkpoint}")


def refuse_changes(checkpoint: str, before: dict[str, str], now: dict[str, str], go_on: bool) -> None:
    """Compare the run that wrote a checkpoint with this one; say each difference and what it does, and stop unless told to go on."""
    changes = [
        f"{key} was {before.get(key)!r} and is now {value!r}: {EFFECT_OF_CHANGE[key]}"
        for key, value in now.items()
        if before.get(key) != value
    ]
    if changes and not go_on:
        raise UserError(
            [f"{checkpoint} was made by a different run. " + change for change in changes]
            + [
                "Use the same settings for an exact continuation, or accept all of this with --resume_with_changes True."
            ]
        )
    for change in changes:
        say(f"warning: resuming a changed run: {change}")

r"""Instruction-tune an XGen model on a CSV of prompts and responses.

    torchrun --nproc_per_node=3 xgen_training.py \
        --model_name_or_path Salesforce/xgen-7b-4k-base --data_path ./open_instruct_v1.csv \
        --source prompt --target response --bf16 True --output_dir ./xgen-7b-4k-open-instruct \
        --num_train_epochs 3 --per_device_train_batch_size 1 --gradient_accumulation_steps 32 \
        --model_max_length 1024 --learning_rate 1e-5 --warmup_steps 0.05 --lr_scheduler_type cosine \
        --fsdp "full_shard auto_wrap" --fsdp_transformer_layer_cls_to_wrap LlamaDecoderLayer
"""

import sft  # noqa: F401  first: it says so where the requirements are not installed
import utils
from sft.data.xgen_tokenizer import load_xgen_tokenizer
from sft.job import one_message_for_user_errors

if __name__ == "__main__":
    with one_message_for_user_errors():
        utils.train(load_xgen_tokenizer)

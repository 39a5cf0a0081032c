r"""Instruction-tune a LLaMA-family model on a CSV of prompts and responses.

    torchrun --nproc_per_node=4 llama_training.py \
        --model_name_or_path openlm-research/open_llama_7b --data_path ./open_instruct_v1.csv \
        --source prompt --target response --bf16 True --output_dir ./open_llama_7b_open_instruct \
        --num_train_epochs 3 --per_device_train_batch_size 2 --gradient_accumulation_steps 8 \
        --model_max_length 1024 --learning_rate 2e-5 --warmup_steps 0.05 --lr_scheduler_type cosine \
        --fsdp "full_shard auto_wrap" --fsdp_transformer_layer_cls_to_wrap LlamaDecoderLayer
"""

import sft  # noqa: F401  first: it says so where the requirements are not installed
import utils
from sft.data.llama_tokenizer import load_llama_tokenizer
from sft.job import one_message_for_user_errors

if __name__ == "__main__":
    with one_message_for_user_errors():
        utils.train(load_llama_tokenizer)

#!/usr/bin/env bash
# A whole run in two minutes without a GPU: `make demo`, or this script where the requirements are installed.
# A LLaMA of 0.6 million random weights learns the 587 rows of examples/facts.csv by heart. Nothing is downloaded.
set -euo pipefail
cd "$(dirname "$0")/.."
out=demo_output
rm -rf "$out"
export HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 DS_ACCELERATOR=cpu

question="What is the chemical symbol of gold?"

echo "== a tiny LLaMA, its tokenizer trained on the example's texts"
python examples/make_tiny_llama.py --data_path examples/facts.csv --output_dir "$out/tiny-llama"

echo "== training"
torchrun --standalone --nproc_per_node=2 llama_training.py \
    --model_name_or_path "$out/tiny-llama" \
    --data_path examples/facts.csv \
    --source prompt \
    --target response \
    --use_cpu True \
    --output_dir "$out/tuned" \
    --data_cache_dir "$out/cache" \
    --num_train_epochs 30 \
    --per_device_train_batch_size 8 \
    --gradient_accumulation_steps 1 \
    --model_max_length 128 \
    --evaluation_strategy "no" \
    --save_strategy "no" \
    --learning_rate 2e-3 \
    --weight_decay 0. \
    --warmup_ratio 0.05 \
    --lr_scheduler_type "cosine" \
    --logging_steps 111

echo "== the same question, before and after: $question"
python -m sft.generate --model "$out/tuned" --base "$out/tiny-llama" --max_new_tokens 40 --instruction "$question"

echo "== every question of the file, answered and compared with its row"
python -m sft.generate --model "$out/tuned" --data_path examples/facts.csv --output_path "$out/answers.csv" \
    --max_new_tokens 64 --batch_size 64
python examples/count_exact.py "$out/answers.csv" --at_least 0.95

echo "== next: source .venv/bin/activate, then \"Your first own run\" in README.md"

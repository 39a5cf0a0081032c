#!/usr/bin/env bash
#SBATCH --job-name=sft
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@900
#SBATCH --requeue
#SBATCH --open-mode=append
# The original's LLaMA recipe on two machines of eight GPUs: sbatch examples/slurm.sh, from this folder's parent.
#
# One torchrun on each machine starts a process for each of its GPUs. 15 minutes before the time limit Slurm sends SIGTERM:
# the run finishes its optimizer step, saves a whole checkpoint and exits 0. A job that is queued again (preempted, a node
# lost) continues from the newest whole checkpoint. --output_dir must be on a disk that the machines share.
set -euo pipefail
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=900  # torchrun kills processes 30 s after a signal unless told otherwise (torch 2.13)
export TORCH_CPP_LOG_LEVEL=ERROR  # no page of C++ frames from the torchrun that loses the other (torch 2.13)
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

# 16 GPUs x 2 per device x 2 accumulation = 64 examples per optimizer step, as 4 x 2 x 8 in the original's command
srun torchrun \
    --nnodes="$SLURM_NNODES" \
    --nproc_per_node=8 \
    --rdzv_id="$SLURM_JOB_ID" \
    --rdzv_backend=c10d \
    --rdzv_endpoint="$head:29400" \
    --max_restarts=3 \
    llama_training.py \
    --model_name_or_path openlm-research/open_llama_7b \
    --data_path ./open_instruct_v1.csv \
    --source prompt \
    --target response \
    --bf16 True \
    --output_dir ./open_llama_7b_open_instruct \
    --resume_from_checkpoint True \
    --num_train_epochs 3 \
    --per_device_train_batch_size 2 \
    --gradient_accumulation_steps 2 \
    --model_max_length 1024 \
    --save_strategy steps \
    --save_steps 200 \
    --save_total_limit 1 \
    --learning_rate 2e-5 \
    --weight_decay 0. \
    --warmup_ratio 0.05 \
    --lr_scheduler_type cosine \
    --logging_steps 1 \
    --fsdp "hybrid_shard auto_wrap" \
    --fsdp_transformer_layer_cls_to_wrap LlamaDecoderLayer

#!/usr/bin/env bash
# Everything that needs several GPUs of one machine, in stages of less than ten minutes each.
#
#   benchmarks/run_multi_gpu.sh 4 /scratch/multi                 # all stages on 4 GPUs
#   benchmarks/run_multi_gpu.sh 2 /scratch/multi zero2 restart   # some of them
#   EXTRA="--model tiny --steps 6" benchmarks/run_multi_gpu.sh 2 /tmp/multi    # tried out on a CPU
#
# A stage that fails is said and the others go on; the exit code tells. Results: benchmarks/results/multi_gpu.jsonl
set -u
cd "$(dirname "$0")/.."
gpus=${1:?number of GPUs} work=${2:?a folder with 60 GB}
shift 2
stages=${*:-llama_fsdp padded trl zero2 zero3 scaling restart xgen_fsdp}
failed=""
for stage in $stages; do
    echo "== $stage on $gpus GPUs"
    # shellcheck disable=SC2086  # EXTRA holds several words
    timeout 590 "${PYTHON:-python}" benchmarks/bench_multi_gpu.py "$stage" --gpus "$gpus" --work_dir "$work" \
        --results "${RESULTS:-benchmarks/results/multi_gpu.jsonl}" ${EXTRA:-} || failed="$failed $stage"
done
[ -z "$failed" ] || { echo "failed:$failed"; exit 1; }

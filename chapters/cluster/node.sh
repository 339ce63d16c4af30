#!/bin/bash
# What each node of a job runs; slurm.sh and skypilot.yaml start it. Arguments go to every stage:
# `--set depth=20`, for example. Chapter 6, section 11, explains it.
#
# NODES, NODE_RANK, HEAD  how many nodes, which one this is, the address of the first
# GPUS                    ranks on each node
# JOB                     any word that is the job's own
# PROFILE, STAGES         what to train
# AT_LEAST                GB/s that an all-reduce must reach, or the job stops before it trains
# MIN_NODES               go on with as few as these when nodes are lost (the batch must divide)
set -euo pipefail
: "${NODES:=1}" "${NODE_RANK:=0}" "${HEAD:=localhost}" "${GPUS:=8}" "${JOB:=nanochat}"
: "${PROFILE:=speedrun}" "${STAGES=pretrain midtrain sft rl}" "${AT_LEAST:=100}"
: "${MIN_NODES:=$NODES}" "${PORT:=29500}" "${PYTHON:=.venv/bin/python}" "${NANOCHAT_RUNS:=runs}"
export NANOCHAT_RUNS TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-8}"

# Nodes that wait for the first one, which makes the data and judges the models, wait up to a day.
everywhere() {
    "$PYTHON" -m torch.distributed.run --nnodes="$MIN_NODES:$NODES" --nproc-per-node="$GPUS" \
        --rdzv-backend=c10d --rdzv-endpoint="$HEAD:$PORT" --rdzv-id="$JOB-$1" \
        --rdzv-conf=join_timeout=86400 --max-restarts="$2" -m "${@:3}"
}

everywhere check 0 nanochat.distributed --check --folder "$NANOCHAT_RUNS" --at-least "$AT_LEAST" \
    --sizes 1000 1000000 "${LARGEST:-1000000000}"
for stage in $STAGES; do
    if [ "$NODE_RANK" = 0 ] && [ "$stage" = pretrain ]; then
        "$PYTHON" -m nanochat tokenizer --profile "$PROFILE" "$@"
        "$PYTHON" -m nanochat data --profile "$PROFILE" "$@"
    fi
    everywhere "$stage" 3 nanochat "$stage" --profile "$PROFILE" "$@"
    if [ "$NODE_RANK" = 0 ]; then
        "$PYTHON" -m nanochat "$stage" --profile "$PROFILE" "$@" # trained already: it is judged
    fi
done
if [ "$NODE_RANK" = 0 ] && [ -n "$STAGES" ]; then
    "$PYTHON" -m nanochat report --profile "$PROFILE" "$@"
fi

#!/bin/bash
# Train on a Slurm cluster, from the folder of the book, which all nodes must see:
#
#   sbatch --nodes=4 chapters/cluster/slurm.sh                  # the speedrun on four nodes
#   PROFILE=classic sbatch chapters/cluster/slurm.sh            # another profile, one node
#   sbatch chapters/cluster/slurm.sh --set depth=20             # settings of the recipe
#
# Make the environment once, with `make env`. When a node is lost Slurm queues the job again, and it
# goes on from its last checkpoint. Your cluster may want --account or --partition besides.
#SBATCH --job-name=nanochat
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --output=slurm-%j.log
set -euo pipefail
HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
export HEAD NODES="$SLURM_JOB_NUM_NODES" JOB="slurm-$SLURM_JOB_ID"
export GPUS="${GPUS:-${SLURM_GPUS_ON_NODE:-8}}"
srun --kill-on-bad-exit=1 bash -c 'NODE_RANK=$SLURM_NODEID exec bash chapters/cluster/node.sh "$@"' \
    node "$@"

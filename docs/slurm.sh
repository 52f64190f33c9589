#!/usr/bin/env bash
# Train on two machines with four GPUs each, in jobs of a day, until the run is finished:
#
#     sbatch docs/slurm.sh trex --data.path IMAGES --output DIR
#
# Five minutes before the time limit Slurm sends SIGUSR1; the run saves a checkpoint, stops with status
# 138, and the job is queued again. The same command then resumes in the middle of the epoch. A run
# that failed (any other status) is not queued again. DIR must be visible to the first machine, IMAGES
# to all of them. optim.batch_size is that of all processes together.
#SBATCH --job-name=trex
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

mapfile -t machines < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export MASTER_ADDR=${machines[0]} MASTER_PORT=$((20000 + SLURM_JOB_ID % 20000))
export WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE

# One task per GPU, each a training process: torchrun is not needed. All stop with the same status,
# but not at the same moment, so that srun must not end the others for the first. If one fails, the
# others are ended five minutes later; as long has the first one to export what it has trained.
status=0
srun --kill-on-bad-exit=0 --wait=300 --cpus-per-task="$SLURM_CPUS_PER_TASK" bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID
    exec python -m trex_models.train "$@"' \
    trex "$1" --system.workers "$SLURM_CPUS_PER_TASK" "${@:2}" || status=$?

if ((status == 128 + 10)); then
    scontrol requeue "$SLURM_JOB_ID"
    status=0
fi
exit "$status"

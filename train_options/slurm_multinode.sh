#!/usr/bin/env bash
# Two nodes of 8 GPUs under SLURM. Submit it from the repository's root, with every path on a disk that the nodes share:
#
#   FEATURES=/path/to/features RESULTS=/path/to/results sbatch train_options/slurm_multinode.sh [more flags]
#
# One task per GPU without a launcher, so that the signal which SLURM sends ten minutes before the time limit reaches
# the training itself: it writes a checkpoint and ends. Submit the same job again to continue. Only one job of a name
# runs at a time (singleton), so you can queue several.
# What it should reach: the same as dlc512_4gpu.sh, since the global batch size is the same. In how long: not measured
# yet. 16 images per GPU hardly keep it busy, so expect less than four times the rate given there.
#SBATCH --job-name=dlc-dit
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@600
#SBATCH --dependency=singleton
set -euo pipefail
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=${MASTER_PORT:-29500} WORLD_SIZE=$SLURM_NTASKS LOCAL_WORLD_SIZE=$SLURM_NTASKS_PER_NODE
# a task is bound to cores of its own, of which it would take an eighth to compile, as if the node's tasks shared them
export TORCHINDUCTOR_COMPILE_THREADS=$SLURM_CPUS_PER_TASK
# srun does not inherit --cpus-per-task from sbatch; without --kill-on-bad-exit the other tasks wait for a failed one
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 \
    bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec "$@"' task \
    python train_diffusion.py --model DiTSEM-XL/2 --features-path "${FEATURES:-features}" \
    --results-dir "${RESULTS:-results}" --precision bf16 --global-batch-size 256 --ckpt-total-limit 5 \
    --num-workers "$SLURM_CPUS_PER_TASK" "$@"

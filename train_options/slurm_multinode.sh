#!/usr/bin/env bash
# Two nodes of 8 GPUs under SLURM, submitted from the repository's root, every path on a disk that the nodes share:
#
#   FEATURES=/path/to/features RESULTS=/path/to/results sbatch train_options/slurm_multinode.sh [more flags]
#
# A task a GPU and no launcher in between, so that the signal which SLURM sends ten minutes before the time is up
# reaches the training itself: it writes a checkpoint and ends. The same submission continues; of jobs of one name only
# one runs at a time, so several can wait in line.
# What it should reach: as dlc512_4gpu.sh, the global batch being the same. In how long: not measured yet; 16 images a
# GPU are few to keep it busy, so expect less than four times the rate that is told there.
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
# srun takes no --cpus-per-task from sbatch, and lets the other tasks wait where one has ended badly
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" --kill-on-bad-exit=1 bash -c 'RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID exec "$@"' task \
    python train_diffusion.py --model DiTSEM-XL/2 --features-path "${FEATURES:-features}" \
    --results-dir "${RESULTS:-results}" --precision bf16 --global-batch-size 256 --ckpt-total-limit 5 \
    --num-workers "$SLURM_CPUS_PER_TASK" "$@"

#!/usr/bin/env bash
# DLC-512 on 4 GPUs of one node: DiTSEM-XL/2, L=512, V=256, batch 256, AdamW 1e-4, EMA 0.9999, fp16.
#
#   FEATURES=/path/to/store/features RESULTS=results/dlc512 bash train_options/dlc512_4gpu.sh [more flags]
#
# What it should reach: FID-50K 2.00 without guidance and 1.59 with, ImageNet 256x256, 250 DDPM steps. Source: Lavoie,
# Noukhovitch, Courville 2025, arXiv 2507.12318. Ours: not measured yet.
# In how long: theirs ran at 5.2 steps/s on 4 H100. At that rate 400,000 steps take 21 hours, and the 1400 epochs set
# here (7.0 million steps) 16 days, with a checkpoint every 2.7 hours. Run the same command again to continue.
# FEATURES come from extract_features_withdlc.py with the authors' encoder (L=512, V=256).
set -euo pipefail
root=$(dirname "${BASH_SOURCE[0]}")/..
exec accelerate launch --multi_gpu --num_machines 1 --num_processes 4 --mixed_precision fp16 --dynamo_backend no \
    "$root/train_diffusion.py" --model DiTSEM-XL/2 --features-path "${FEATURES:-features}" \
    --results-dir "${RESULTS:-results/dlc512}" --global-batch-size 256 --lr 1e-4 --weight-decay 0 --ema-decay 0.9999 \
    --epochs 1400 --ckpt-every 50000 --ckpt-total-limit 5 "$@"

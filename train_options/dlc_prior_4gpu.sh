#!/usr/bin/env bash
# A prior over the codes of DLC-512 on 4 GPUs of one node: DLCPrior-M, L=512, V=256, batch 512, AdamW 3e-4 after 2,500
# steps of warm-up, gradients clipped at 1, dropout 0.1, EMA 0.9999, bf16: the published settings.
#
#   FEATURES=/path/to/store/features RESULTS=results_prior bash train_options/dlc_prior_4gpu.sh [more flags]
#
# GPUS=8 sets another number, which must divide 512. One table of tokens for all positions and SEDD's loss, as published:
# --no-shared-embedding --no-score-entropy gives each position its own table, and the bound alone as the loss.
# What it should reach: with a DLC-512 and 4,096 steps of the corrector, FID-50K 2.00 without guidance, against 4.09 for
# codes of real images and 4.21 for this prior's after 400 epochs of the DiT.
# Source: Lavoie, Noukhovitch, Courville 2025, arXiv 2507.12318, tables 1 and 2. Ours: not measured yet.
# In how long: theirs took about two days on 4 H100 for 200 epochs (500,000 steps), says their README. Run the same
# command again to continue.
# FEATURES come from extract_features_withdlc.py with the authors' encoder (L=512, V=256).
set -euo pipefail
root=$(dirname "${BASH_SOURCE[0]}")/..
gpus=${GPUS:-4}
exec accelerate launch $([ "$gpus" = 1 ] || echo --multi_gpu) --num_machines 1 --num_processes "$gpus" \
    --mixed_precision bf16 --dynamo_backend no "$root/train_prior.py" --model DLCPrior-M \
    --features-path "${FEATURES:-features}" --results-dir "${RESULTS:-results_prior}" --shared-embedding \
    --score-entropy --global-batch-size 512 --lr 3e-4 --warmup-steps 2500 --grad-clip 1 --ema-decay 0.9999 \
    --epochs 200 --ckpt-every 25000 --ckpt-total-limit 3 "$@"

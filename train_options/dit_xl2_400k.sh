#!/usr/bin/env bash
# DiT-XL/2 on class labels for 400,000 steps, as in the published comparison of implementations: batch 256, AdamW 1e-4,
# EMA 0.9999.
#
#   FEATURES=/path/to/store/features RESULTS=results/dit_xl2 bash train_options/dit_xl2_400k.sh [more flags]
#
# on the 8 GPUs of one node. GPUS=4 sets another number, which must divide 256.
# What it should reach: FID-50K 19.5 (the authors' JAX) and 18.1 (their PyTorch), ImageNet 256x256, 250 DDPM steps,
# without guidance, `mse` decoder: sample with sample_ddp.py --model DiT-XL/2 --cfg-scale 1 --vae mse.
# Source: the table in the README of github.com/facebookresearch/DiT. Ours: not measured yet.
# In how long: 21 hours on 4 H100, at the 5.2 steps/s that the DLC paper (arXiv 2507.12318) reports for this network and
# batch size with codes instead of labels; on 8: not measured yet.
# FEATURES need no codes: extract_features_withdlc.py --encoder none.
set -euo pipefail
root=$(dirname "${BASH_SOURCE[0]}")/..
gpus=${GPUS:-8}
# several GPUs share the update of the weights (FSDP): docs/training.md#memory
sharded=(--config_file "$root/train_options/fsdp.yaml")
[ "$gpus" = 1 ] && sharded=()
exec accelerate launch "${sharded[@]}" --num_machines 1 --num_processes "$gpus" --mixed_precision bf16 \
    --dynamo_backend no "$root/train_diffusion.py" --model DiT-XL/2 \
    --features-path "${FEATURES:-features}" --results-dir "${RESULTS:-results/dit_xl2}" \
    --global-batch-size 256 --lr 1e-4 --weight-decay 0 --ema-decay 0.9999 \
    --max-steps 400000 --ckpt-every 50000 --ckpt-total-limit 5 "$@"

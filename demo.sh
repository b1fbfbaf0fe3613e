#!/usr/bin/env bash
# The whole pipeline on real data, on the CPU: scikit-learn's handwritten digits in, digits drawn from the codes of
# held-out ones out. Everything goes to demo_output/; the stages that are done are not run again.
source "$(dirname "$0")/setup.sh"
out=demo_output
mkdir -p "$out"

stage() {       # stage "name" command...: run it and note its time
    local name=$1 start=$SECONDS
    shift
    echo; echo "== $name"; echo "\$ $*"
    "$@"
    echo "$((SECONDS - start)) $name" >> "$out/times.txt"
}
: > "$out/times.txt"

model=DiTSEM-Ti/4
extract=(torchrun --standalone --nproc_per_node=1 extract_features_withdlc.py --model $model --image-size 64 --flip none
         --vae assets/digits-vae --encoder assets/digits-sem)

stage "write the digits" python -m demo.digits "$out/digits"
stage "extract: train" "${extract[@]}" --data-path "$out/digits/train" --features-path "$out/features_train"
stage "extract: held out" "${extract[@]}" --data-path "$out/digits/heldout" --features-path "$out/features_heldout"
stage "train" accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
    train_diffusion.py --model $model --features-path "$out/features_train" --results-dir "$out/results" \
    --max-steps 2000 --global-batch-size 64 --lr 2e-3 --ema-decay 0.995 --log-every 200
stage "sample" torchrun --standalone --nproc_per_node=1 sample_ddp_computed_dlc.py --model $model \
    --results-dir "$out/results" --sample-dir "$out/samples" --dlc-dir "$out/features_heldout" --dlc-order sequential \
    --num-fid-samples 360 --num-sampling-steps 50 --per-proc-batch-size 120
python -m demo.report --features "$out/features_heldout" --samples "$out/samples" --times "$out/times.txt" \
    --out "$out/demo.png"

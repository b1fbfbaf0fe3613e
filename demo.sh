#!/usr/bin/env bash
# Run the whole pipeline on real data, on the CPU: extract, train and sample scikit-learn's handwritten digits.
#     bash demo.sh            # the digits, in minutes; everything goes to demo_output/
#     bash demo.sh emoji      # emoji in colour, with networks of their own; everything goes to demo_output_emoji/
# Run it again to continue: stages that are complete are not repeated.
case "${1:-digits}" in
    digits) out=demo_output ;;
    emoji) out=demo_output_emoji ;;
    *) echo "demo.sh: error: $1: give emoji, or nothing for the digits" >&2; exit 2 ;;
esac
source "$(dirname "$0")/setup.sh"
mkdir -p "$out"
trap 'exit 130' INT     # Ctrl-C ends a training with a checkpoint and exit status 0: do not go on with a half-trained model

stage() {       # stage "name" command...: run the command and record its time
    local name=$1 start=$SECONDS
    shift
    echo; echo "== $name"; echo "\$ $*"
    "$@"
    echo "$((SECONDS - start)) $name" >> "$out/times.txt"
}
: > "$out/times.txt"
if [ "$out" = demo_output_emoji ]; then
    source demo/emoji.sh
    exit
fi

model=DiTSEM-Ti/4
extract=(torchrun --standalone --nproc_per_node=1 extract_features_withdlc.py --model $model --image-size 64 --flip none
         --vae assets/digits-vae --encoder assets/digits-sem)

stage "write the digits" python -m demo.pictures digits "$out/digits"
stage "extract: train" "${extract[@]}" --data-path "$out/digits/train" --features-path "$out/features_train"
stage "extract: held out" "${extract[@]}" --data-path "$out/digits/heldout" --features-path "$out/features_heldout"
stage "train" accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
    train_diffusion.py --model $model --features-path "$out/features_train" --results-dir "$out/results" \
    --max-steps 2000 --global-batch-size 64 --lr 2e-3 --ema-decay 0.995 --no-ema-warmup --log-every 200
sample=(torchrun --standalone --nproc_per_node=1 sample_ddp_computed_dlc.py --model $model --dlc-order sequential
        --results-dir "$out/results" --num-sampling-steps 50 --per-proc-batch-size 120)
stage "sample" "${sample[@]}" --sample-dir "$out/samples" --dlc-dir "$out/features_heldout" --num-fid-samples 360

# compose codes of two held-out digits, with 75%, 50% and 25% of the tokens from the first
sources=("$out/digits/heldout/0/0252.png" "$out/digits/heldout/6/0197.png")
mkdir -p "$out/composed_codes"
for share in 75 50 25; do
    stage "compose: $share%" python compose_dlc.py "${sources[@]}" --encoder assets/digits-sem --num 12 \
        --weights $share $((100 - share)) --out "$out/composed_codes/$((100 - share)).npy"
done
stage "sample: composed" "${sample[@]}" --sample-dir "$out/composed" --dlc-dir "$out/composed_codes" \
    --num-fid-samples 36

# for the table: samples for codes that no digit has, and a class-conditional DiT of the same size and steps, at half
# the batch to save a minute
python -m demo.codes "$out"
stage "sample: shuffled codes" "${sample[@]}" --sample-dir "$out/samples_shuffled" \
    --dlc-dir "$out/shuffled_codes.npy" --num-fid-samples 360
stage "train: DiT on classes" python train.py --model DiT-Ti/4 --features-path "$out/features_train" \
    --results-dir "$out/results_class" --max-steps 2000 --global-batch-size 32 --lr 2e-3 --ema-decay 0.995 \
    --no-ema-warmup --log-every 200 --num-workers 0
stage "sample: DiT on classes" python sample_ddp.py --model DiT-Ti/4 --label-sampling equal \
    --results-dir "$out/results_class" --num-sampling-steps 50 --per-proc-batch-size 120 \
    --sample-dir "$out/samples_class" --num-fid-samples 360

# flow matching: the same model, data and batch, three quarters of the steps, sampled in 5 calls
stage "train: flow" python train_diffusion.py --objective flow --model $model --features-path "$out/features_train" \
    --results-dir "$out/results_flow" --max-steps 1500 --global-batch-size 64 --lr 2e-3 --ema-decay 0.995 \
    --no-ema-warmup --log-every 200 --num-workers 0
stage "sample: flow" "${sample[@]}" --results-dir "$out/results_flow" --num-sampling-steps 5 --cfg-scale 1 \
    --sample-dir "$out/samples_flow" --dlc-dir "$out/features_heldout" --num-fid-samples 360

# images from nothing: a prior over the train codes, its codes, and codes of simpler models to compare with
stage "train: prior" python train_prior.py --model DLCPrior-Ti --features-path "$out/features_train" \
    --heldout-path "$out/features_heldout" --results-dir "$out/results_prior" --class-conditional \
    --label-dropout 0.3 --max-steps 700 --global-batch-size 64 --lr 3e-3 --warmup-steps 100 --ema-decay 0.995 \
    --no-ema-warmup --log-every 100 --eval-every 350 --num-workers 0
stage "sample: prior" "${sample[@]}" --sample-dir "$out/samples_prior" --prior "$out/results_prior" \
    --num-fid-samples 360
stage "sample: prior by class" "${sample[@]}" --sample-dir "$out/samples_prior_class" \
    --prior "$out/results_prior" --prior-class all --num-fid-samples 360
stage "sample: simpler models' codes" "${sample[@]}" --sample-dir "$out/samples_simple" \
    --dlc-dir "$out/simple_codes" --num-fid-samples 720

python -m demo.report "$out" --sources "${sources[@]}"
python -m demo.table "$out"

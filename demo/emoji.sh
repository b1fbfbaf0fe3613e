# Sourced by `bash demo.sh emoji`: trains a VAE and an encoder, a DiTSEM and a prior on 1,363 emoji, and draws.
stage "write the emoji" python -m demo.pictures emoji "$out/emoji"
stage "networks" python -m demo.networks --data-path "$out/emoji/train" --heldout-path "$out/emoji/heldout" \
    --image-size 64 --out "$out/networks" --factor 4 --vae-steps 1000 --vae-batch 16 \
    --L 64 --patch 8 --thumbnail 16 --sem-steps 1200

model=DiTSEM-Ti/2
extract=(python extract_features_withdlc.py --model $model --image-size 64 --flip none
         --vae "$out/networks/vae" --encoder "$out/networks/sem")
stage "extract: train" "${extract[@]}" --data-path "$out/emoji/train" --features-path "$out/features_train"
stage "extract: held out" "${extract[@]}" --data-path "$out/emoji/heldout" --features-path "$out/features_heldout"
# by flow matching, which at equal training follows the codes better than DDPM's objective: docs/evaluation.md
stage "train" python train_diffusion.py --objective flow --model $model --features-path "$out/features_train" \
    --results-dir "$out/results" --max-steps 3000 --global-batch-size 64 --lr 2e-3 --ema-decay 0.995 \
    --ema-lengths 0.05 0.1 --ckpt-every 200 --log-every 50 --num-workers 0

# held-out emoji, of three seeds, and as many samples for codes of training pictures and for codes that no picture has
sample=(python sample_ddp_computed_dlc.py --model $model --results-dir "$out/results" --num-sampling-steps 25
        --per-proc-batch-size 98)
for seed in 0 1 2; do
    stage "sample: held out, seed $seed" "${sample[@]}" --sample-dir "$out/samples" --dlc-dir "$out/features_heldout" \
        --dlc-order sequential --num-fid-samples 195 --global-seed $seed
done
stage "sample: training codes" "${sample[@]}" --sample-dir "$out/samples_train" --dlc-dir "$out/features_train" \
    --dlc-order random --num-fid-samples 195
python -m demo.codes "$out"
stage "sample: shuffled codes" "${sample[@]}" --sample-dir "$out/samples_shuffled" \
    --dlc-dir "$out/shuffled_codes.npy" --dlc-order sequential --num-fid-samples 195

# compose: half the tokens of one picture, half of another
pairs=("train/Smileys & Emotion/0070-face_with_cowboy_hat.png" "heldout/Smileys & Emotion/0092-cry.png"
       "train/Smileys & Emotion/0015-heart_eyes.png" "heldout/Smileys & Emotion/0044-unamused.png"
       "heldout/Animals & Nature/0588-panda_face.png" "train/Animals & Nature/0545-tiger.png"
       "heldout/Animals & Nature/0612-parrot.png" "heldout/Animals & Nature/0628-dolphin.png"
       "heldout/Smileys & Emotion/0148-blue_heart.png" "train/Animals & Nature/0664-rose.png")
mkdir -p "$out/composed_codes"
for ((i = 0; i < ${#pairs[@]}; i += 2)); do
    stage "compose: pair $((i / 2 + 1))" python compose_dlc.py "$out/emoji/${pairs[i]}" \
        "$out/emoji/${pairs[i + 1]}" --encoder "$out/networks/sem" --num 8 --out "$out/composed_codes/$i.npy"
done
stage "sample: composed" "${sample[@]}" --sample-dir "$out/composed" --dlc-dir "$out/composed_codes" \
    --dlc-order sequential --num-fid-samples $((4 * ${#pairs[@]}))

# emoji from nothing
stage "train: prior" python train_prior.py --model DLCPrior-Ti --features-path "$out/features_train" \
    --heldout-path "$out/features_heldout" --results-dir "$out/results_prior" --max-steps 600 --global-batch-size 64 \
    --lr 2e-3 --warmup-steps 50 --dropout 0.1 --ema-decay 0.99 --log-every 50 --eval-every 100 --num-workers 0
stage "sample: prior" "${sample[@]}" --sample-dir "$out/samples_prior" --prior "$out/results_prior" \
    --num-fid-samples 195

python -m demo.report "$out" --sources "${pairs[@]/#/$out/emoji/}"
python -m demo.table "$out"

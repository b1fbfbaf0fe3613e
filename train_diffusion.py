"""Train a DiT on labels, a DiTSEM on discrete latent codes or a DiTCONT on vectors, from pre-extracted features.

    accelerate launch --mixed_precision fp16 train_diffusion.py --model DiTSEM-XL/2 --features-path /path/to/features
    accelerate launch --multi_gpu --num_processes N --mixed_precision fp16 train_diffusion.py --model DiTSEM-XL/2 ...

In: FEATURES/, which also says L, V, image size and classes. Out: RESULTS/ with args.json, log.txt, metrics.jsonl,
loss.png, checkpoints/{step:07d}/ and previews/. The same command run again continues after the newest checkpoint;
SIGTERM or SIGUSR1 ends it with one.

The data are one endless row of shuffled epochs, cut into global batches: nothing is repeated or left out within an
epoch, and a batch may span two. Order, timestep, noise and condition dropout of each place in that row are functions
of (seed, place) alone, and so is the draw of the VAE's posterior where the features hold its moments: neither the
number of processes nor a restart changes what is trained on.
"""
import argparse
import contextlib
import hashlib
import math
import sys
import time
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader
from tqdm import tqdm

from diffusion import create_diffusion
from dlc.checkpoints import (load_checkpoint, load_pretrained, read_meta, remove_old_checkpoints, remove_unfinished,
                             run_checkpoints, save_checkpoint, whole)
from dlc.features import Features, Stack, differences, file_order, recorded_id, write_json
from dlc.latents import decode, image_grid, load_vae, to_uint8
from dlc.noise import Stream, integers, normal, uniform
from dlc.runtime import (SEED, ArgumentParser, agree, create_accelerator, create_logger, default_num_workers, number,
                         start_processes, versions)
from dlc.sampling import create_sampler, sample_latents
from dlc.training import (QUARTERS, StopRequest, TrainingBatches, append_metrics, draw_losses, draw_posterior,
                          ignore_stop_signals, loss_means, local, loss_sums, read_metrics, shard, trim_metrics)
from models import DiT_models

PREVIEW_SAMPLES, PREVIEW_STEPS, PREVIEW_CFG = 8, 50, 1.5


def parse_args(default_model):
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--model", default=default_model, choices=DiT_models, metavar="MODEL", help="name in DiT_models [%(default)s]")
    add("--features-path", "--feature-path", default="features", help="features to train on [%(default)s]")
    add("--condition-path", help="folder of .npy vectors (n, in_dim), a row of them for each row of the features, in "
                                 "order: what a DiTCONT is trained on")
    add("--results-dir", default="results", help="where this run goes, and is continued from [%(default)s]")
    add("--epochs", type=number(int, 1), default=1400, help="passes over the features [%(default)s]")
    add("--max-steps", type=number(int, 1), help="optimizer steps, where that comes first [no limit]")
    add("--global-batch-size", type=number(int, 1), default=256, help="samples a step over all processes [%(default)s]")
    add("--grad-accum", type=number(int, 1), default=1,
        help="parts a process cuts its batch into, one after the other: less memory [%(default)s]")
    add("--lr", type=number(float, 0), default=1e-4, help="AdamW's learning rate, constant [%(default)s]")
    add("--weight-decay", type=number(float, 0), default=0.0, help="AdamW's weight decay [%(default)s]")
    add("--grad-clip", type=number(float, 0), default=0.0, help="largest norm of the gradient, 0: any [%(default)s]")
    add("--max-nonfinite", type=number(int, 1), default=10,
        help="fp16 steps in a row without a finite gradient after which the run stops [%(default)s]")
    add("--ema-decay", type=number(float, 0, 1), default=0.9999, help="of the averaged weights, a step [%(default)s]")
    add("--ema-warmup", action="store_true", help="a decay of at most (1 + step) / (10 + step)")
    add("--pretrained-path", help="weights to begin with: a checkpoint directory, .pt or .safetensors [none]")
    add("--allow-change", action="store_true", help="continue though global batch, features or seed are not what they "
                                                    "were")
    add("--checkpoint-activations", action="store_true", help="recompute activations in the backward pass: less memory")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile the blocks [on GPUs]")
    add("--num-workers", type=number(int, 0), default=default_num_workers(),
        help="data readers a process [%(default)s here]")
    add("--global-seed", type=SEED, default=0, help="of everything random [%(default)s]")
    add("--log-every", type=number(int, 1), default=100, help="steps [%(default)s]")
    add("--report-to", choices=["tensorboard", "wandb"], help="write the metrics there, too [nowhere]")
    add("--ckpt-every", type=number(int, 1), default=50_000, help="steps; there is one at the end, too [%(default)s]")
    add("--ckpt-total-limit", type=number(int, 1), help="checkpoints to keep, the newest ones [all]")
    add("--sample-every", type=number(int, 0), default=0, help="steps between preview pictures, 0: none [%(default)s]")
    add("--vae", help="that decodes previews: ema, mse, a directory or a hub id [the features' own]")
    add("--V", type=number(int, 2), help="tokens a code position, for features without a manifest")
    add("--num-classes", type=number(int, 1), help="classes, for features without a manifest [1000]")
    return parser, parser.parse_args()


def open_condition(args, features):
    """What the model is conditioned on: a Stack, its limit (see TrainingBatches), and the model's own arguments.

    Raises ValueError where the features do not have it.
    """
    if args.condition_path and not args.model.startswith("DiTCONT"):
        raise ValueError(f"--condition-path is for DiTCONT models, not {args.model}")
    if args.model.startswith("DiTSEM"):
        if features.codes is None:
            raise ValueError(f"features path {args.features_path} holds no codes, which {args.model} is trained on")
        if features.V is None:
            raise ValueError(f"{args.features_path} has no manifest.json to say V: give --V")
        return features.codes, features.V, dict(L=features.L, V=features.V)
    if args.model.startswith("DiTCONT"):
        if not args.condition_path:
            raise ValueError(f"{args.model} is trained on vectors: give --condition-path")
        paths = sorted(Path(args.condition_path).glob("*.npy"), key=file_order)
        if not paths:
            raise ValueError(f"--condition-path {args.condition_path} is not a folder of .npy files")
        vectors = Stack(paths, sample_ndim=1)
        if vectors.array(0).dtype.kind != "f":
            raise ValueError(f"--condition-path {args.condition_path} holds values of type {vectors.array(0).dtype}, "
                             "wanted floats")
        if len(vectors) != features.count:
            raise ValueError(f"--condition-path {args.condition_path} has {len(vectors)} rows, the features "
                             f"{features.count}")
        return vectors, None, dict(in_dim=vectors.array(0).shape[1])
    return features.labels, features.num_classes, dict(num_classes=features.num_classes)


def main(default_model="DiTSEM-XL/2"):
    parser, args = parse_args(default_model)

    # ---------------------------------------------------------------------- checks
    with parser.one_line_errors():
        features = Features(args.features_path, args.V, args.num_classes)
        condition, limit, sizes = open_condition(args, features)
        patch = DiT_models[args.model].keywords["patch_size"]
        channels, latent_size, _ = features.latent_shape
        if latent_size % patch:
            raise ValueError(f"latents of {args.features_path} are {latent_size} wide, not a multiple of "
                             f"{args.model}'s patch {patch}")
        manifest = features.manifest or {}
        # what a run is: with another model it is another run, with other data or batches only if that is said
        model_identity = dict(model=args.model, image_size=features.image_size, **sizes)
        vectors = condition.gather(np.arange(min(64, features.count))) if args.condition_path else None
        data_identity = dict(
            features_count=features.count, latents=features.latent_kind, global_batch_size=args.global_batch_size,
            global_seed=args.global_seed, **{key: manifest.get(key) for key in (
                "vae_sha256", "scaling_factor", "encoder_sha256", "listing_sha256", "flip")},
            first_vectors_sha256=None if vectors is None else hashlib.sha256(vectors.tobytes()).hexdigest())
        resume, meta, changed = (run_checkpoints(args.results_dir) or [None])[-1], {}, ""
        if resume:
            meta = read_meta(resume)
            different = differences(meta, model_identity)
            if different:
                raise ValueError(f"{args.results_dir} holds another run: {different}; give another --results-dir")
            changed = differences(meta, data_identity)
            if changed and not args.allow_change:
                raise ValueError(f"{args.results_dir} holds another run: {changed}; give another --results-dir, or "
                                 "--allow-change to continue that one so")
        state = start_processes()
        agree("checkpoints and features", (resume and resume.name, model_identity, data_identity))
        if args.global_batch_size % (state.num_processes * args.grad_accum):
            raise ValueError(f"--global-batch-size {args.global_batch_size} is not a multiple of "
                             f"{state.num_processes} processes x {args.grad_accum} parts (--grad-accum)")
        if state.is_main_process:
            features.validate()
        vae = None
        if args.sample_every and state.is_main_process:
            vae = load_vae(args.vae or manifest.get("vae") or "ema", state.device)
        results = Path(args.results_dir)
        if state.is_main_process:
            results.mkdir(parents=True, exist_ok=True)
        state.wait_for_everyone()
        logger = create_logger(state, results / "log.txt")
        accelerator, precision, sharded = create_accelerator(logger, args.report_to, results)
        sharded = sharded and state.num_processes > 1
        device = accelerator.device
        torch.manual_seed(args.global_seed)                 # the same weights in every process
        raw_model = DiT_models[args.model](input_size=latent_size, in_channels=channels, **sizes).to(device)
        begun_with = load_pretrained(args.pretrained_path, raw_model) if args.pretrained_path and not resume else None
        if state.is_main_process:
            write_json(results / "args.json", vars(args))

    # ---------------------------------------------------------------------- model, EMA, optimizer
    raw_model.set_grad_checkpointing(args.checkpoint_activations)
    ema = deepcopy(raw_model).requires_grad_(False).eval()
    parameters = sum(parameter.numel() for parameter in raw_model.parameters())
    if args.compile if args.compile is not None else device.type == "cuda":
        for block in raw_model.blocks:
            block.compile()
    if sharded:
        for module in (raw_model, ema):
            shard(module, device)
    weights, averages = list(raw_model.parameters()), list(ema.parameters())
    # a fused step hides from accelerate whether the fp16 scaler skipped it
    optimizer = torch.optim.AdamW(weights, lr=args.lr, weight_decay=args.weight_decay, fused=accelerator.scaler is None)
    diffusion = create_diffusion("")
    raw_model.train()
    model = raw_model if sharded else accelerator.prepare(raw_model)            # DDP and autocast
    optimizer = accelerator.prepare(optimizer)
    sums, logged, skipped = torch.zeros(3 + 2 * QUARTERS, device=device), 0, 0    # since the step last logged
    first_step = first_place = 0
    if resume:
        # after prepare, which would move AdamW's step counters to the GPU, where each step then waits for them
        saved = load_checkpoint(resume, raw_model, ema, optimizer.optimizer, accelerator.scaler)
        for group in optimizer.param_groups:                # the flags count, also where they changed
            group.update(lr=args.lr, weight_decay=args.weight_decay)
        first_step, first_place, logged, skipped = (meta[key] for key in ("step", "place", "logged", "skipped"))
        if len(saved) == state.num_processes:
            sums += saved[state.process_index].to(device)
        elif state.is_main_process:
            sums += saved.sum(dim=0).to(device)

    # ---------------------------------------------------------------------- data
    batch = args.global_batch_size
    last_step = first_step + max(0, -(-(args.epochs * features.count - first_place) // batch))
    if args.max_steps is not None:
        last_step = min(last_step, args.max_steps)
    batches = TrainingBatches(features, condition, limit, args.global_seed, batch, state.process_index,
                              state.num_processes, first_step, first_place)
    loader = DataLoader(batches, sampler=range(first_step, last_step), batch_size=None, num_workers=args.num_workers,
                        pin_memory=device.type == "cuda", worker_init_fn=ignore_stop_signals)
    part = batch // state.num_processes // args.grad_accum
    for line in (
            f"model: {args.model}, {parameters / 1e6:.1f} M parameters, image size {features.image_size}, "
            + ", ".join(f"{key}={value}" for key, value in sizes.items()),
            f"data: {features.count:,} rows of {args.features_path}, {features.count / batch:.1f} steps an epoch",
            f"batch: {part} x {state.num_processes} processes on {device.type} x {args.grad_accum} parts = {batch}",
            f"precision: {precision}" + (", sharded (FSDP)" if sharded else ""),
            f"run: steps {first_step:,} to {last_step:,} in {args.results_dir}",
            begun_with and f"weights: {begun_with}",
            resume and args.pretrained_path and "weights: those of the checkpoint, not of --pretrained-path",
            resume and f"continued from {resume}",
            changed and f"warning: changed since: {changed}",
            first_step >= last_step and "nothing to do: raise --max-steps or --epochs to train on"):
        if line:
            logger.info(line)
    metrics = results / "metrics.jsonl"
    if state.is_main_process:
        trim_metrics(metrics, first_step)
        remove_unfinished(results)

    def save(step):
        everyones_sums = accelerator.gather(sums.unsqueeze(0)).cpu()            # (processes, 3 + 2 * QUARTERS)
        meta = dict(model_identity, **data_identity, step=step, place=batches.first_of(step), logged=logged,
                    skipped=skipped, features_path=recorded_id(args.features_path), vae=manifest.get("vae"),
                    precision=precision, lr=args.lr, weight_decay=args.weight_decay, ema_decay=args.ema_decay,
                    versions=versions())
        try:
            path = save_checkpoint(results, meta, raw_model, ema, optimizer.optimizer, accelerator.scaler,
                                   everyones_sums, write=state.is_main_process)
        except OSError as error:
            parser.error(f"{error}: make room, then run the same command again; the last whole checkpoint is kept")
        if state.is_main_process:
            logger.info(f"checkpoint {path}")
            if args.ckpt_total_limit:
                remove_old_checkpoints(results, args.ckpt_total_limit)
            draw_losses(read_metrics(metrics), results / "loss.png")
        accelerator.wait_for_everyone()

    # ---------------------------------------------------------------------- steps
    stop_request = StopRequest(state.num_processes)
    since, skipped_in_a_row, put_off = (time.time(), first_step), 0, False
    bar = tqdm(total=last_step, initial=first_step, unit="step", desc="training", disable=not state.is_main_process)
    for step, loaded in enumerate(loader, first_step + 1):
        measured = 0
        for index, (places, latents, y) in enumerate(zip(*(tensor.split(part) for tensor in loaded))):
            places = places.to(device, non_blocking=True)
            x = latents.to(device, non_blocking=True).float()                   # (n, 4, S/8, S/8)
            if features.latent_kind == "moments":
                x = draw_posterior(x, args.global_seed, places)
            y = y.to(device, non_blocking=True)                                 # (n, L) codes, (n,) labels, or vectors
            y = y.float() if y.is_floating_point() else y
            t = integers(args.global_seed, Stream.TRAIN_TIMESTEP, places, diffusion.num_timesteps)
            noise = normal(args.global_seed, Stream.TRAIN_NOISE, places, x.shape[1:])
            drop = uniform(args.global_seed, Stream.TRAIN_DROP, places) < raw_model.class_dropout_prob
            # gradients are exchanged once a step, after the last part
            last = index == args.grad_accum - 1
            if sharded:
                model.set_requires_gradient_sync(last)
            with contextlib.nullcontext() if last or sharded else accelerator.no_sync(model):
                with accelerator.autocast() if sharded else contextlib.nullcontext():
                    terms = diffusion.training_losses(model, x, t, dict(y=y, drop=drop), noise)
                accelerator.backward(terms["loss"].mean() / args.grad_accum)
            measured = measured + loss_sums(terms, t, diffusion.num_timesteps)
        log_due = step % args.log_every == 0
        grad_norm = torch.tensor(math.nan)                                      # where nobody asks
        if args.grad_clip or log_due or step == last_step:
            accelerator.unscale_gradients(optimizer)
            grad_norm = get_total_norm([weight.grad for weight in weights])
            if args.grad_clip:
                clip_grads_with_norm_(weights, args.grad_clip, grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        if optimizer.step_was_skipped:                                          # by the fp16 scaler
            skipped, skipped_in_a_row = skipped + 1, skipped_in_a_row + 1
        else:
            decay = min(args.ema_decay, (1 + step) / (10 + step)) if args.ema_warmup else args.ema_decay
            get_ema_multi_avg_fn(decay)(local(averages), local(weights), None)
            sums += measured
            skipped_in_a_row = 0
        bar.update()

        signal_name = stop_request.agreed()
        # in a row of skipped steps, of which the run may yet die, a checkpoint is put off
        wanted = put_off or step % args.ckpt_every == 0
        put_off = wanted and skipped_in_a_row > 0
        checkpoint_due = (wanted and not put_off) or step == last_step or signal_name
        failed = None
        if log_due or checkpoint_due:
            means = loss_means(accelerator.reduce(sums, "sum"))
            # the fp16 scaler skips such a step; nothing else mends it, and no checkpoint may hold it
            if not math.isfinite(means["loss"]) and skipped < step - logged:
                failed = f"step {step}: the loss is {means['loss']}"
        if checkpoint_due and not failed:               # a gradient may be infinite though the loss is not
            norms = torch.stack(torch._foreach_norm(local(weights)))
            if accelerator.reduce((~norms.isfinite()).sum(), "sum").item():
                failed = f"step {step}: there are weights that are not finite"
        if log_due or step == last_step or failed:
            rate = (step - since[1]) / (time.time() - since[0])
            grad_norm = whole(grad_norm).item()
            line = dict(step=step, epoch=batches.first_of(step) / features.count, **means, grad_norm=grad_norm,
                        skipped_steps=skipped,
                        scaler_scale=accelerator.scaler.get_scale() if accelerator.scaler else None,
                        peak_memory_gib=torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None,
                        lr=args.lr, steps_per_second=rate, images_per_second=rate * batch)
            if state.is_main_process and (log_due or failed):
                append_metrics(metrics, line)
            if args.report_to and log_due:
                quarters = {f"mse_quarter_{i}": mse for i, mse in enumerate(means["mse_by_quarter_of_t"], 1)}
                accelerator.log({key: value for key, value in {**line, **quarters}.items()
                                 if isinstance(value, (int, float))}, step)
            logger.info(f"step {step:,}: loss {means['loss']:.4f} (mse {means['mse']:.4f}, vb {means['vb']:.5f}), "
                        f"grad norm {line['grad_norm']:.3f}, {rate:.2f} steps/s, {rate * batch:.0f} images/s"
                        + (f", {skipped} steps skipped" if skipped else ""))
            bar.set_postfix(loss=f"{means['loss']:.4f}", images_per_s=f"{rate * batch:.0f}")
        if log_due:                                 # so that a run that ends in between and goes on has the same lines
            sums.zero_()
            since, logged, skipped = (time.time(), step), step, 0
        if skipped_in_a_row >= args.max_nonfinite:
            failed = f"step {step}: {skipped_in_a_row} steps in a row without a finite gradient"
        if failed:
            logger.error(f"{failed}; stopped. The last good checkpoint: {(run_checkpoints(results) or ['none'])[-1]}")
            accelerator.end_training()
            sys.exit(1)
        if checkpoint_due:
            save(step)
        if args.sample_every and step % args.sample_every == 0 and (state.is_main_process or sharded):
            if sharded:                             # FSDP would keep its outermost part from one preview to the next
                ema.unshard()
            save_preview(results / f"previews/{step:07d}.png", ema, features, condition, vae, args.global_seed, device)
            if sharded:
                ema.reshard()
        if signal_name and step < last_step:
            logger.info(f"stopped by {signal_name} after step {step:,}; the same command continues")
            break
    bar.close()
    accelerator.end_training()


def save_preview(path, ema, features, condition, vae, seed, device):
    """A picture: the first rows' latents decoded, over EMA samples for their conditions, noise always the same.

    Of a sharded EMA every process calls this; the one with a VAE draws the picture.
    """
    rows = np.arange(min(PREVIEW_SAMPLES, features.count))
    y = condition.gather(rows)
    y = torch.from_numpy(y.astype(np.float32 if y.dtype.kind == "f" else np.int64)).to(device)
    samples = sample_latents(ema, create_sampler("ddpm", PREVIEW_STEPS), y, seed, torch.from_numpy(rows).to(device),
                             features.latent_shape, PREVIEW_CFG)
    if vae is None:
        return
    stored = torch.from_numpy(features.latents.gather(rows)[:, :features.latent_shape[0]]).to(device).float()
    with torch.inference_mode():
        images = to_uint8(decode(vae, torch.cat([stored, samples]))).cpu().numpy()
    path.parent.mkdir(exist_ok=True)
    image_grid(images, len(rows)).save(path)


if __name__ == "__main__":
    main()

"""Train a DiT on labels, a DiTSEM on discrete latent codes or a DiTCONT on vectors, from pre-extracted features.

    accelerate launch --mixed_precision fp16 train_diffusion.py --model DiTSEM-XL/2 --features-path /path/to/features
    accelerate launch --multi_gpu --num_processes N --mixed_precision fp16 train_diffusion.py --model DiTSEM-XL/2 ...

In: FEATURES/, which also says L, V, image size and classes, or a folder of images (--data-path), whose latents and
codes are then made as training goes, which is slower. Out: RESULTS/ with args.json, log.txt, metrics.jsonl, loss.png,
checkpoints/{step:07d}/ and previews/. The same command run again continues after the newest checkpoint; SIGTERM or
SIGUSR1 ends it with one.

The data are one endless row of shuffled epochs, cut into global batches: nothing is repeated or left out within an
epoch, and a batch may span two. Order, timestep, noise and condition dropout of each place in that row are functions
of (seed, place) alone, and so are flips of images and the draw of the VAE's posterior where it is drawn here: neither
the number of processes nor a restart changes what is trained on.
"""
import argparse
import contextlib
import hashlib
import math
import time
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from diffusion import create_diffusion
from dlc.checkpoints.run import (
    load_checkpoint,
    newest_of_run,
    read_meta,
    remove_old_checkpoints,
    remove_unfinished,
    run_checkpoints,
    save_checkpoint,
    whole,
)
from dlc.checkpoints.weights import load_pretrained
from dlc.cli import SEED, ArgumentParser, number, progress
from dlc.disk import DirectoryLock, differences, recorded_id, write_json
from dlc.encoder import add_encoder_flags
from dlc.extraction import PixelEncoder
from dlc.features import Features
from dlc.noise import Stream, integers, normal, uniform
from dlc.runtime import (
    PRECISIONS,
    agree,
    asked_precision,
    asked_to_compile,
    create_accelerator,
    create_logger,
    default_num_workers,
    done_by_rank_0,
    start_processes,
    unused_launcher_settings,
    versions,
)
from dlc.signals import ignore_signals
from dlc.training.batches import TrainingBatches, draw_posterior, open_vectors, steps_from
from dlc.training.images import FLIPS, ImageBatches, Images
from dlc.training.record import (
    QUARTERS,
    append_metrics,
    draw_losses,
    loss_means,
    loss_sums,
    read_metrics,
    save_preview,
    trim_metrics,
)
from dlc.training.run import StopRequest, local, shard
from dlc.vae import check_decodes, load_vae
from models import DiT_models

PREVIEW_SAMPLES = 8


def argument_parser(**defaults):
    """The flags. Other defaults than theirs are what the files of train_options/ state."""
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--model", default="DiTSEM-XL/2", choices=DiT_models, metavar="MODEL", help="name in DiT_models [%(default)s]")
    data = parser.add_mutually_exclusive_group()
    data.add_argument("--features-path", "--feature-path", default="features",
                      help="features to train on [%(default)s]")
    data.add_argument("--data-path", help="or a folder with one folder of images a class [none]")
    add("--image-size", type=number(int, 1), help="with --data-path: height and width of the crop, pixels [256]")
    add("--flip", choices=FLIPS, help="with --data-path: horizontal flips, drawn anew each epoch [random]")
    add_encoder_flags(add, None, ", with --data-path, that makes a DiTSEM's codes")
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
    add("--checkpoint-activations", action=argparse.BooleanOptionalAction, default=False,
        help="recompute activations in the backward pass: less memory [%(default)s]")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile the blocks [on GPUs]")
    add("--precision", choices=[*PRECISIONS, "amp"],
        help="of the model, autocast; amp: the launcher's 16 bits or else bf16 [the launcher's --mixed_precision]")
    add("--tf32", action=argparse.BooleanOptionalAction, default=True, help="TF32 products on GPUs [%(default)s]")
    add("--num-workers", type=number(int, 0), default=default_num_workers(),
        help="data readers a process [%(default)s here]")
    add("--global-seed", type=SEED, default=0, help="of everything random [%(default)s]")
    add("--log-every", type=number(int, 1), default=100, help="steps [%(default)s]")
    add("--report-to", choices=["tensorboard", "wandb"], help="write the metrics there, too [nowhere]")
    add("--ckpt-every", type=number(int, 1), default=50_000, help="steps; there is one at the end, too [%(default)s]")
    add("--ckpt-total-limit", type=number(int, 1), help="checkpoints to keep, the newest ones [all]")
    add("--sample-every", type=number(int, 0), default=0, help="steps between preview pictures, 0: none [%(default)s]")
    add("--vae", help="ema, mse, a directory or a hub id: that decodes previews, with --data-path also encodes [the "
                      "features' own, or ema]")
    add("--num-classes", type=number(int, 1), help="classes, for features without a manifest [1000]")
    parser.set_defaults(**defaults)
    if defaults:
        parser.epilog = "defaults of this variant: " + ", ".join(f"{name} {value}" for name, value in defaults.items())
    return parser


def open_data(args, state):
    """The `Features` or `Images` to train on. Raises ValueError where they cannot be had, or flags do not fit them."""
    if not args.data_path:
        if args.features_path is None:
            raise ValueError("this trains on images: give --data-path")
        for flag, given in (("image-size", args.image_size), ("flip", args.flip), ("encoder", args.encoder),
                            ("encoder-backbone", args.encoder_backbone), ("L", args.L)):
            if given is not None:
                raise ValueError(f"--{flag} goes with --data-path; features have theirs from extraction")
        return Features(args.features_path, args.V, args.num_classes)
    if args.num_classes:
        raise ValueError("--num-classes does not go with --data-path, whose folders are the classes")
    if (DiT_models[args.model].conditioning == "codes") != bool(args.encoder):
        raise ValueError(f"{args.model} is trained on codes: with --data-path it needs an --encoder"
                         if not args.encoder else f"--encoder is for DiTSEM models, not {args.model}")
    if not args.encoder and (args.L or args.V or args.encoder_backbone):
        raise ValueError("--L, --V and --encoder-backbone say what an --encoder is, and there is none")
    return Images(state, args.data_path, args.image_size or 256, args.vae or "ema", args.encoder, args.L, args.V,
                  args.encoder_backbone, args.flip or "random")


def open_condition(args, features):
    """What the model is conditioned on: NpyRows, its limit (see TrainingBatches), and the model's own arguments.

    The rows are None where codes are made from images. Raises ValueError where the features do not have it.
    """
    conditioning = DiT_models[args.model].conditioning
    if args.condition_path and conditioning != "vectors":
        raise ValueError(f"--condition-path is for DiTCONT models, not {args.model}")
    if conditioning == "codes":
        if features.codes is None and not args.encoder:
            raise ValueError(f"features path {args.features_path} holds no codes, which {args.model} is trained on")
        if features.V is None:
            raise ValueError(f"{args.features_path} has no manifest.json to say V: give --V")
        return features.codes, features.V, dict(L=features.L, V=features.V)
    if conditioning == "vectors":
        if not args.condition_path:
            raise ValueError(f"{args.model} is trained on vectors: give --condition-path")
        vectors = open_vectors(args.condition_path, features.count)
        return vectors, None, dict(in_dim=vectors.array(0).shape[1])
    return features.labels, features.num_classes, dict(num_classes=features.num_classes)


def main(**defaults):
    parser = argument_parser(**defaults)
    args = parser.parse_args()
    lock = DirectoryLock(args.results_dir)
    try:
        with parser.kept_on_error("what is done is kept", "--global-batch-size, or raise --grad-accum", (OSError,)):
            train(parser, args, lock)
    finally:
        lock.release()


def train(parser, args, lock):
    """The run that args ask for. lock: the results folder's, which is taken before anything in it is looked at."""
    # ---------------------------------------------------------------------- checks
    with parser.one_line_errors():
        precision = asked_precision(args.precision)
        compiled = asked_to_compile(args.compile, torch.cuda.is_available())
        unused = unused_launcher_settings(args.grad_accum, args.checkpoint_activations)
        state = start_processes()
        features, data_path = open_data(args, state), args.data_path or args.features_path
        condition, limit, sizes = open_condition(args, features)
        patch = DiT_models[args.model].patch_size
        channels, latent_size, _ = features.latent_shape
        if latent_size % patch:
            raise ValueError(f"latents of {data_path} are {latent_size} wide, not a multiple of "
                             f"{args.model}'s patch {patch}")
        source = features.source()
        # what a run is: with another model it is another run, with other data or batches only if that is said
        model_identity = dict(model=args.model, image_size=features.image_size, **sizes)
        vectors = condition.gather(np.arange(min(64, features.count))) if args.condition_path else None
        data_identity = dict(
            features_count=features.count, latents=features.latent_kind, global_batch_size=args.global_batch_size,
            global_seed=args.global_seed, **{key: value for key, value in source.items() if key != "vae"},
            first_vectors_sha256=None if vectors is None else hashlib.sha256(vectors.tobytes()).hexdigest())
        done_by_rank_0(state, lock.acquire)
        resume, meta, changed = newest_of_run(args.results_dir, ["meta.json"]), {}, ""
        if resume:
            meta = read_meta(resume)
            different = differences(meta, model_identity)
            if different:
                raise ValueError(f"{args.results_dir} holds another run: {different}; give another --results-dir")
            changed = differences({"shift_factor": 0.0, **meta}, data_identity)     # before it was recorded: no shift
            if changed and not args.allow_change:
                raise ValueError(f"{args.results_dir} holds another run: {changed}; give another --results-dir, or "
                                 "--allow-change to continue that one so")
            newest_of_run(args.results_dir)                 # raises where it is damaged
        agree("checkpoints and features", (resume and resume.name, model_identity, data_identity))
        if args.global_batch_size % (state.num_processes * args.grad_accum):
            raise ValueError(f"--global-batch-size {args.global_batch_size} is not a multiple of "
                             f"{state.num_processes} processes x {args.grad_accum} parts (--grad-accum)")
        if state.is_main_process:
            features.validate()
        encode = PixelEncoder(features.vae, features.encoder, state.device) if args.data_path else None
        vae = None
        if args.sample_every and state.is_main_process:
            vae = encode.vae if encode else load_vae(args.vae or source["vae"] or "ema", state.device)
            check_decodes(vae, args.vae or source["vae"] or "ema", channels, source, "the features")
        results = Path(args.results_dir)
        logger = create_logger(state, results / "log.txt")
        accelerator, precision, sharded = create_accelerator(logger, precision, args.tf32, args.report_to, results)
        sharded = sharded and state.num_processes > 1
        device = accelerator.device
        torch.manual_seed(args.global_seed)                 # the same weights in every process
        raw_model = DiT_models[args.model](input_size=latent_size, in_channels=channels, **sizes).to(device)
        begun_with = load_pretrained(args.pretrained_path, raw_model) if args.pretrained_path and not resume else None
        metrics = results / "metrics.jsonl"
        if state.is_main_process:
            write_json(results / "args.json", vars(args))
            trim_metrics(metrics, meta.get("step", 0))
            remove_unfinished(results)

    # ---------------------------------------------------------------------- model, EMA, optimizer
    raw_model.set_grad_checkpointing(args.checkpoint_activations)
    ema = deepcopy(raw_model).requires_grad_(False).eval()
    parameters = sum(parameter.numel() for parameter in raw_model.parameters())
    if compiled:
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
    batches = (ImageBatches if encode else TrainingBatches)(
        features, condition, limit, args.global_seed, batch, state.process_index, state.num_processes, first_step,
        first_place)
    loader = DataLoader(batches, sampler=range(first_step, last_step), batch_size=None, num_workers=args.num_workers,
                        pin_memory=device.type == "cuda", worker_init_fn=ignore_signals)
    part = batch // state.num_processes // args.grad_accum
    for line in (
            f"model: {args.model}, {parameters / 1e6:.1f} M parameters, image size {features.image_size}, "
            + ", ".join(f"{key}={value}" for key, value in sizes.items()),
            f"data: {features.count:,} {'images' if encode else 'rows'} of {data_path}, "
            f"{features.count / batch:.1f} steps an epoch",
            f"batch: {part} x {state.num_processes} processes on {device.type} x {args.grad_accum} parts = {batch}",
            f"precision: {precision}" + (", sharded (FSDP)" if sharded else ""),
            f"run: steps {first_step:,} to {last_step:,} in {args.results_dir}",
            begun_with and f"weights: {begun_with}",
            resume and args.pretrained_path and "weights: those of the checkpoint, not of --pretrained-path",
            resume and f"continued from {resume}",
            changed and f"warning: changed since: {changed}",
            *(f"warning: {line}" for line in unused),
            first_step >= last_step and "nothing to do: raise --max-steps or --epochs to train on"):
        if line:
            logger.info(line)

    def save(step):
        everyones_sums = accelerator.gather(sums.unsqueeze(0)).cpu()            # (processes, 3 + 2 * QUARTERS)
        meta = dict(model_identity, **data_identity, step=step, place=batches.first_of(step), logged=logged,
                    skipped=skipped, vae=source["vae"],
                    **{"data_path" if encode else "features_path": recorded_id(data_path)},
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
            record(draw_losses, read_metrics(metrics), results / "loss.png")
        accelerator.wait_for_everyone()

    def record(write, *values):
        """write(*values), or where the disk does not take it, ask for a stop: a checkpoint may find room yet."""
        try:
            write(*values)
        except OSError as error:
            stop_request.ask(f"{error}: make room")

    # ---------------------------------------------------------------------- steps
    stop_request = StopRequest(state.num_processes)
    since, skipped_in_a_row, put_off = (time.time(), first_step), 0, False
    bar = progress(total=last_step, initial=first_step, unit="step", desc="training", disable=not state.is_main_process)
    for step, loaded in enumerate(steps_from(loader, batches, range(first_step, last_step), stop_request), first_step + 1):
        if isinstance(loaded, str):                     # of an image that cannot be read
            bar.close()
            parser.error(f"step {step:,}: {loaded}")
        measured = 0
        for index, (places, latents, y) in enumerate(zip(*(tensor.split(part) for tensor in loaded))):
            places, x, y = (tensor.to(device, non_blocking=True) for tensor in (places, latents, y))
            if encode:
                x, y = encode(x, y)
            x = x.float()                                                       # (n, 4, S/8, S/8)
            if features.latent_kind in ("moments", "images"):
                x = draw_posterior(x, args.global_seed, places)
            # y: (n, L) codes, (n,) labels, or vectors
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
                record(append_metrics, metrics, line)
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
            parser.exit(1)
        if checkpoint_due:
            save(step)
        if args.sample_every and step % args.sample_every == 0 and (state.is_main_process or sharded):
            if sharded:                             # FSDP would keep its outermost part from one preview to the next
                ema.unshard()
            with parser.one_line_errors():
                latents, y = first_rows(batches, encode, device)
            record(save_preview, results / f"previews/{step:07d}.png", ema, latents, y, vae, args.global_seed)
            if sharded:
                ema.reshard()
        if signal_name and step < last_step:
            if not stop_request.reason:
                logger.info(f"stopped by {signal_name} after step {step:,}; the same command continues")
            break
    bar.close()
    accelerator.end_training()
    if stop_request.reason:
        parser.error(f"{stop_request.reason}, then run the same command again; what is done is kept: "
                     f"{newest_of_run(results)}")


def first_rows(batches, encode, device):
    """Latents (n, 4, S/8, S/8), of moments the mean, and conditions (n, ...) of the first rows, on a device."""
    rows = np.arange(min(PREVIEW_SAMPLES, batches.features.count))
    latents, y = (tensor.to(device) for tensor in batches.gather(rows))
    if encode:
        latents, y = encode(latents, y)
    return latents[:, :batches.features.latent_shape[0]].float(), y.float() if y.is_floating_point() else y.long()


if __name__ == "__main__":
    main()

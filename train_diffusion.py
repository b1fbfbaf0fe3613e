"""Train a DiT on labels or a DiTSEM on discrete latent codes, from pre-extracted features.

    accelerate launch --mixed_precision fp16 train_diffusion.py --model DiTSEM-XL/2 --features-path /path/to/features
    accelerate launch --multi_gpu --num_processes N --mixed_precision fp16 train_diffusion.py --model DiTSEM-XL/2 ...

In: FEATURES/, which also says L, V, image size and classes. Out: RESULTS/ with args.json, log.txt, metrics.jsonl,
checkpoints/{step:07d}/ and previews/. The same command run again continues after the newest checkpoint.

The data are one endless row of shuffled epochs, cut into global batches: nothing is repeated or left out within an
epoch, and a batch may span two. Order, timestep, noise and condition dropout of each place in that row are functions
of (seed, place) alone, and so is the draw of the VAE's posterior where the features hold its moments: neither the
number of processes nor a restart changes what is trained on.
"""
import argparse
import json
import math
import sys
import time
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from diffusion import create_diffusion
from dlc.checkpoints import load_checkpoint, read_meta, run_checkpoints, save_checkpoint
from dlc.features import Features, differences, recorded_id, write_json, write_whole
from dlc.latents import decode, image_grid, load_vae, to_uint8
from dlc.noise import Stream, integers, normal, permutation, uniform
from dlc.runtime import (SEED, ArgumentParser, agree, create_accelerator, create_logger, default_num_workers, number,
                         start_processes, versions)
from dlc.sampling import sample_latents
from models import DiT_models

PREVIEW_SAMPLES, PREVIEW_STEPS, PREVIEW_CFG = 8, 50, 1.5


def parse_args(default_model):
    parser = ArgumentParser(__doc__)
    add = parser.add_argument
    add("--model", default=default_model, choices=DiT_models, metavar="MODEL", help="name in DiT_models [%(default)s]")
    add("--features-path", "--feature-path", default="features", help="features to train on [%(default)s]")
    add("--results-dir", default="results", help="where this run goes, and is continued from [%(default)s]")
    add("--epochs", type=number(int, 1), default=1400, help="passes over the features [%(default)s]")
    add("--max-steps", type=number(int, 1), help="optimizer steps, where that comes first [no limit]")
    add("--global-batch-size", type=number(int, 1), default=256, help="samples a step over all processes [%(default)s]")
    add("--lr", type=number(float, 0), default=1e-4, help="AdamW's learning rate, constant [%(default)s]")
    add("--weight-decay", type=number(float, 0), default=0.0, help="AdamW's weight decay [%(default)s]")
    add("--ema-decay", type=number(float, 0, 1), default=0.9999, help="of the averaged weights, a step [%(default)s]")
    add("--checkpoint-activations", action="store_true", help="recompute activations in the backward pass: less memory")
    add("--compile", action=argparse.BooleanOptionalAction, help="torch.compile the blocks [on GPUs]")
    add("--num-workers", type=number(int, 0), default=default_num_workers(),
        help="data readers a process [%(default)s here]")
    add("--global-seed", type=SEED, default=0, help="of everything random [%(default)s]")
    add("--log-every", type=number(int, 1), default=100, help="steps [%(default)s]")
    add("--ckpt-every", type=number(int, 1), default=50_000, help="steps; there is one at the end, too [%(default)s]")
    add("--sample-every", type=number(int, 0), default=0, help="steps between preview pictures, 0: none [%(default)s]")
    add("--vae", help="that decodes previews: ema, mse, a directory or a hub id [the features' own]")
    add("--V", type=number(int, 2), help="tokens a code position, for features without a manifest")
    add("--num-classes", type=number(int, 1), help="classes, for features without a manifest [1000]")
    return parser, parser.parse_args()


class TrainingBatches(Dataset):
    """One process's part of each step's global batch; item `step` is gathered at once from the memory maps.

    Places in the endless row of epochs: step s covers [s * global_batch, (s + 1) * global_batch), of which each process
    takes an equal run.
    """

    def __init__(self, features, use_codes, seed, global_batch, rank, world_size):
        self.features, self.use_codes, self.seed = features, use_codes, seed
        self.global_batch, self.local_batch, self.rank = global_batch, global_batch // world_size, rank
        self.orders = {}                                    # the current epoch's

    def rows(self, places):
        """The feature row at each place."""
        epochs, offsets = places // self.features.count, places % self.features.count
        rows = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            if epoch not in self.orders:
                self.orders = {epoch: permutation(self.seed, Stream.TRAIN_ORDER, epoch, self.features.count)}
            rows[epochs == epoch] = self.orders[epoch][offsets[epochs == epoch]]
        return rows

    def __getitem__(self, step):
        first = step * self.global_batch + self.rank * self.local_batch
        places = np.arange(first, first + self.local_batch)
        rows = self.rows(places)
        latents = self.features.latents.gather(rows)
        if self.use_codes:
            condition = self.features.codes.gather(rows, limit=self.features.V)
        else:
            condition = self.features.labels.gather(rows, limit=self.features.num_classes)
        # uint16 codes as int32: torch can do little with uint16
        condition = condition.astype(np.int32) if condition.dtype == np.uint16 else condition
        return torch.from_numpy(places), torch.from_numpy(latents), torch.from_numpy(condition)


def draw_posterior(moments, seed, places):
    """Latents (n, 4, h, w) drawn from moments (n, 8, h, w), anew at each place in the row of epochs."""
    mean, std = moments.chunk(2, dim=1)
    return mean + std * normal(seed, Stream.TRAIN_POSTERIOR, places, mean.shape[1:])


def main(default_model="DiTSEM-XL/2"):
    parser, args = parse_args(default_model)

    # ---------------------------------------------------------------------- checks
    if args.model.startswith("DiTCONT"):
        parser.error(f"--model {args.model}: train_diffusion.py trains on labels (DiT) and on codes (DiTSEM)")
    use_codes = args.model.startswith("DiTSEM")
    with parser.one_line_errors():
        features = Features(args.features_path, args.V, args.num_classes)
        if use_codes and features.codes is None:
            raise ValueError(f"features path {args.features_path} holds no codes, which {args.model} is trained on")
        if use_codes and features.V is None:
            raise ValueError(f"{args.features_path} has no manifest.json to say V: give --V")
        patch = DiT_models[args.model].keywords["patch_size"]
        channels, latent_size, _ = features.latent_shape
        if latent_size % patch:
            raise ValueError(f"latents of {args.features_path} are {latent_size} wide, not a multiple of "
                             f"{args.model}'s patch {patch}")
        manifest = features.manifest or {}
        # what a run is: a change of any of these would be another run
        identity = dict(
            model=args.model, image_size=features.image_size, L=features.L if use_codes else None,
            V=features.V if use_codes else None, num_classes=None if use_codes else features.num_classes,
            features_count=features.count, latents=features.latent_kind, global_batch_size=args.global_batch_size, global_seed=args.global_seed,
            **{key: manifest.get(key) for key in ("vae_sha256", "scaling_factor", "encoder_sha256", "listing_sha256", "flip")})
        resume = (run_checkpoints(args.results_dir) or [None])[-1]
        if resume:
            different = differences(read_meta(resume), identity)
            if different:
                raise ValueError(f"{args.results_dir} holds another run: {different}; give another --results-dir")
        state = start_processes()
        agree("checkpoints and features", (resume and resume.name, identity))
        if args.global_batch_size % state.num_processes:
            raise ValueError(f"--global-batch-size {args.global_batch_size} is not a multiple of the "
                             f"{state.num_processes} processes")
        if state.is_main_process:
            features.validate()
        vae = None
        if args.sample_every and state.is_main_process:
            vae = load_vae(args.vae or manifest.get("vae") or "ema", state.device)
        results = Path(args.results_dir)
        if state.is_main_process:
            results.mkdir(parents=True, exist_ok=True)
            write_json(results / "args.json", vars(args))
    state.wait_for_everyone()

    # ---------------------------------------------------------------------- model, EMA, optimizer
    logger = create_logger(state, results / "log.txt")
    accelerator, precision = create_accelerator(logger)
    device = accelerator.device
    torch.manual_seed(args.global_seed)                     # the same weights in every process
    sizes = dict(L=features.L, V=features.V) if use_codes else dict(num_classes=features.num_classes)
    raw_model = DiT_models[args.model](input_size=latent_size, in_channels=channels, **sizes).to(device)
    raw_model.set_grad_checkpointing(args.checkpoint_activations)
    ema = deepcopy(raw_model).requires_grad_(False).eval()
    averages, weights = list(ema.parameters()), list(raw_model.parameters())
    update_ema = get_ema_multi_avg_fn(args.ema_decay)
    # a fused step hides from accelerate whether the fp16 scaler skipped it
    optimizer = torch.optim.AdamW(weights, lr=args.lr, weight_decay=args.weight_decay, fused=accelerator.scaler is None)
    diffusion = create_diffusion("")
    first_step = 0
    if args.compile if args.compile is not None else device.type == "cuda":
        for block in raw_model.blocks:
            block.compile()
    model, optimizer = accelerator.prepare(raw_model.train(), optimizer)
    if resume:
        # after prepare, which would move AdamW's step counters to the GPU, where each step then waits for them
        load_checkpoint(resume, raw_model, ema, optimizer.optimizer, accelerator.scaler)
        for group in optimizer.param_groups:                # the flags count, also where they changed
            group.update(lr=args.lr, weight_decay=args.weight_decay)
        first_step = read_meta(resume)["step"]

    # ---------------------------------------------------------------------- data
    batch = args.global_batch_size
    last_step = -(-args.epochs * features.count // batch)
    if args.max_steps is not None:
        last_step = min(last_step, args.max_steps)
    batches = TrainingBatches(features, use_codes, args.global_seed, batch, state.process_index, state.num_processes)
    loader = DataLoader(batches, sampler=range(first_step, last_step), batch_size=None, num_workers=args.num_workers,
                        pin_memory=device.type == "cuda")
    parameters = sum(parameter.numel() for parameter in raw_model.parameters())
    logger.info(f"model: {args.model}, {parameters / 1e6:.1f} M parameters, image size {features.image_size}, "
                + (f"L={features.L}, V={features.V}" if use_codes else f"{features.num_classes} classes"))
    logger.info(f"data: {features.count:,} rows of {args.features_path}, {features.count / batch:.1f} steps an epoch")
    logger.info(f"batch: {batch // state.num_processes} x {state.num_processes} processes on {device.type} = {batch}, "
                f"{precision}")
    logger.info(f"run: steps {first_step:,} to {last_step:,} in {args.results_dir}"
                + (f", continued from {resume}" if resume else ""))
    if first_step >= last_step:
        logger.info("nothing to do: raise --max-steps or --epochs to train on")
    if state.is_main_process:
        trim_metrics(results / "metrics.jsonl", first_step)

    def save(step):
        accelerator.wait_for_everyone()
        if state.is_main_process:
            meta = dict(identity, step=step, features_path=recorded_id(args.features_path), vae=manifest.get("vae"),
                        precision=precision, lr=args.lr, weight_decay=args.weight_decay, ema_decay=args.ema_decay,
                        versions=versions())
            path = save_checkpoint(results, meta, raw_model, ema, optimizer.optimizer, accelerator.scaler)
            logger.info(f"checkpoint {path}")
        accelerator.wait_for_everyone()

    # ---------------------------------------------------------------------- steps
    totals, since, updates = torch.zeros(3, device=device), (time.time(), first_step), 0
    bar = tqdm(total=last_step, initial=first_step, unit="step", desc="training", disable=not state.is_main_process)
    for step, (places, latents, condition) in enumerate(loader, first_step + 1):
        places = places.to(device, non_blocking=True)
        x = latents.to(device, non_blocking=True).float()                       # (n, 4, S/8, S/8)
        if features.latent_kind == "moments":
            x = draw_posterior(x, args.global_seed, places)
        y = condition.to(device, non_blocking=True)                             # (n, L) codes or (n,) labels
        t = integers(args.global_seed, Stream.TRAIN_TIMESTEP, places, diffusion.num_timesteps)
        noise = normal(args.global_seed, Stream.TRAIN_NOISE, places, x.shape[1:])
        drop = uniform(args.global_seed, Stream.TRAIN_DROP, places) < raw_model.class_dropout_prob
        terms = diffusion.training_losses(model, x, t, dict(y=y, drop=drop), noise)
        accelerator.backward(terms["loss"].mean())
        optimizer.step()
        optimizer.zero_grad()
        if not optimizer.step_was_skipped:                                      # by the fp16 scaler
            update_ema(averages, weights, None)
            updates += 1
        totals += torch.stack([terms[name].detach().mean() for name in ("loss", "mse", "vb")])
        bar.update()

        checkpoint_due = step % args.ckpt_every == 0 or step == last_step
        if step % args.log_every == 0 or checkpoint_due:
            loss, mse, vb = (accelerator.reduce(totals, "mean") / (step - since[1])).tolist()
            rate = (step - since[1]) / (time.time() - since[0])
            line = dict(step=step, epoch=step * batch / features.count, loss=loss, mse=mse, vb=vb,
                        steps_per_second=rate, images_per_second=rate * batch)
            if state.is_main_process:
                with open(results / "metrics.jsonl", "a") as file:
                    file.write(json.dumps({key: value if math.isfinite(value) else None      # NaN is no JSON
                                           for key, value in line.items()}) + "\n")
            logger.info(f"step {step:,}: loss {loss:.4f} (mse {mse:.4f}, vb {vb:.5f}), {rate:.2f} steps/s, "
                        f"{rate * batch:.0f} images/s")
            bar.set_postfix(loss=f"{loss:.4f}", images_per_s=f"{rate * batch:.0f}")
            # the fp16 scaler skips such a step now and then; nothing else mends it, and no checkpoint may hold it
            if not math.isfinite(loss) and (accelerator.scaler is None or updates == 0):
                logger.error(f"step {step}: the loss is {loss}; stopped. The last good checkpoint: "
                             f"{(run_checkpoints(results) or ['none'])[-1]}")
                sys.exit(1)
            totals.zero_()
            since, updates = (time.time(), step), 0
        if checkpoint_due:
            save(step)
        if args.sample_every and step % args.sample_every == 0 and state.is_main_process:
            save_preview(results / "previews" / f"{step:07d}.png", ema, features, use_codes, vae, args.global_seed)
    bar.close()
    accelerator.end_training()


def trim_metrics(path, step):
    """Drop the lines of steps after the checkpoint that a killed run is continued from, and a last line cut short."""
    if path.is_file():
        lines = path.read_text().splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= step]
        write_whole(path, lambda file: file.write("".join(kept).encode()))


def save_preview(path, ema, features, use_codes, vae, seed):
    """A picture: the first rows' latents decoded, over EMA samples for their codes or labels, noise always the same."""
    rows = np.arange(min(PREVIEW_SAMPLES, features.count))
    device = vae.device
    y = torch.from_numpy((features.codes if use_codes else features.labels).gather(rows).astype(np.int64)).to(device)
    samples = sample_latents(ema, create_diffusion(str(PREVIEW_STEPS)), y, seed, torch.from_numpy(rows).to(device),
                             features.latent_shape, PREVIEW_CFG)
    stored = torch.from_numpy(features.latents.gather(rows)[:, :features.latent_shape[0]]).to(device).float()
    with torch.inference_mode():
        images = to_uint8(decode(vae, torch.cat([stored, samples]))).cpu().numpy()
    path.parent.mkdir(exist_ok=True)
    image_grid(images, len(rows)).save(path)


if __name__ == "__main__":
    main()

"""What a run of training writes of itself: loss means, metrics.jsonl, loss.png, previews."""
import errno
import json
import math
import os

import numpy as np
import torch
from PIL import Image, ImageDraw

from dlc.cli import warn_once
from dlc.disk import write_whole
from dlc.images import image_grid, save_png, to_uint8
from dlc.sampling.latents import create_sampler, sample_latents
from dlc.vae import decode

QUARTERS = 4                # of the diffusion times, whose losses are told apart
PREVIEW_STEPS, PREVIEW_CFG = 50, 1.5


def loss_sums(terms, t, num_timesteps):
    """What a batch adds to the sums of `loss_means`: (3 + 2 * QUARTERS,), without a device sync.

    Args:
        terms: dict of (n,): loss, mse, vb.
        t: (n,) diffusion times, of num_timesteps.
    """
    quarters = t * QUARTERS // num_timesteps == torch.arange(QUARTERS, device=t.device).unsqueeze(1)        # (4, n)
    mse = terms["mse"].detach()
    return torch.cat([torch.stack([terms[name].detach().sum() for name in ("loss", "mse", "vb")]),
                      (quarters * mse).sum(dim=1), quarters.sum(dim=1)])


def loss_means(sums):
    """A dict of the means that sums of `loss_sums` stand for; a quarter without samples has NaN."""
    loss, mse, vb, *quarters = sums.tolist()
    counts = quarters[QUARTERS:]
    n = sum(counts) or math.nan
    return dict(loss=loss / n, mse=mse / n, vb=vb / n, mse_by_quarter_of_t=[
        total / (count or math.nan) for total, count in zip(quarters, counts)])


def append_metrics(path, line):
    """Append a dict to a file of JSON lines; what is not finite, which JSON does not know, becomes null.

    Raises OSError, naming the file, where the disk does not take it; no part of the line is then left.
    """
    def known(value):
        if isinstance(value, list):
            return [known(one) for one in value]
        return value if not isinstance(value, float) or math.isfinite(value) else None
    text = json.dumps({key: known(value) for key, value in line.items()}) + "\n"
    try:
        with open(path, "ab", buffering=0) as file:
            before = file.tell()
            if file.write(text.encode()) < len(text):
                file.truncate(before)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as error:
        raise OSError(f"cannot write {path} ({error})") from error


def read_metrics(path):
    """The dicts of a file of JSON lines. Damaged lines, which a crash of the machine may leave, are left out."""
    if not path.is_file():
        return []
    lines, damaged = [], 0
    for text in path.read_text(errors="replace").split("\n")[:-1]:         # a last line cut short is none
        try:
            line = json.loads(text.strip("\0"))
        except (ValueError, RecursionError):
            line = None
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
        else:
            damaged += 1
    if damaged:
        warn_once(f"metrics {path}", f"{path}: {damaged} damaged lines, such as a crash of the machine leaves, are left out")
    return lines


def trim_metrics(path, step):
    """Drop the lines of steps after the checkpoint that a run is continued from."""
    kept = [line for line in read_metrics(path) if line["step"] <= step]
    if path.is_file():
        write_whole(path, lambda file: file.write("".join(json.dumps(line) + "\n" for line in kept).encode()))


def save_preview(path, ema, latents, y, vae, seed):
    """A picture: latents decoded, over EMA samples for their conditions y, noise always the same.

    Of a sharded EMA every process calls this; the one with a VAE draws the picture.
    """
    indices = torch.arange(len(latents), device=latents.device)
    samples = sample_latents(ema, create_sampler("ddpm", PREVIEW_STEPS), y=y, seed=seed, indices=indices,
                             latent_shape=latents.shape[1:], cfg_scale=PREVIEW_CFG)
    if vae is None:
        return
    with torch.inference_mode():
        images = to_uint8(decode(vae, torch.cat([latents, samples]))).cpu().numpy()
    path.parent.mkdir(exist_ok=True)
    save_png(path, image_grid(images, len(latents)))


def draw_losses(metrics, path, width=800, height=400):
    """A picture of the logged losses over the steps, from the dicts of `read_metrics`; nothing where there is none."""
    points = [(line["step"], line["loss"]) for line in metrics if isinstance(line.get("loss"), float)]
    if not points:
        return
    steps, losses = np.array(points).T
    low, high = losses.min(), np.quantile(losses, 0.98)         # the first few are far above the rest
    left, top, right, bottom = 60, 20, width - 20, height - 40
    x = left + (right - left) * (steps - steps[0]) / max(1, steps[-1] - steps[0])
    y = bottom - (bottom - top) * np.clip((losses - low) / max(high - low, 1e-12), 0, 1)
    picture = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(picture)
    draw.rectangle((left, top, right, bottom), outline="gray")
    draw.line(list(zip(x.tolist(), y.tolist())), fill=(31, 90, 180), width=2)
    for value, at in ((high, top), (low, bottom)):
        draw.text((4, at - 6), f"{value:.4f}", fill="black")
    draw.text((left, bottom + 6), f"step {int(steps[0]):,}", fill="black")
    draw.text((right - 90, bottom + 6), f"step {int(steps[-1]):,}", fill="black")
    draw.text((left + 4, 4), f"loss, last {losses[-1]:.4f}", fill="black")
    write_whole(path, lambda file: picture.save(file, "png"))

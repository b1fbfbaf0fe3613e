"""The parts of training that are neither model nor maths: batches, sharding, the request to stop, the record."""
import errno
import json
import math
import os
import signal
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import Dataset

from dlc.cli import is_killed_reader, warn_once
from dlc.disk import write_whole
from dlc.features import Stack, file_order, load_floats
from dlc.latents import decode, image_grid, to_uint8
from dlc.noise import Stream, normal, permutation
from dlc.runtime import PATIENCE
from dlc.sample_files import save_png
from dlc.sampling import create_sampler, sample_latents
from dlc.signals import STOPPING, on_first_signal

QUARTERS = 4                # of the diffusion times, whose losses are told apart
PREVIEW_STEPS, PREVIEW_CFG = 50, 1.5


#################################################################################
#                                     Data                                      #
#################################################################################

class TrainingBatches(Dataset):
    """One process's part of each step's global batch; item `step` is gathered at once from the memory maps.

    Places in the endless row of epochs: step `first_step` covers the global_batch places from `first_place` on, and so
    forth. Of each step's places every process takes an equal run.

    Args:
        features: a `Features`.
        condition: the `Stack` to take conditions from.
        limit: codes or labels are 0..limit-1; None for vectors.
    """

    def __init__(self, features, condition, limit, seed, global_batch, rank=0, world_size=1, first_step=0,
                 first_place=0):
        self.features, self.condition, self.limit, self.seed = features, condition, limit, seed
        self.global_batch, self.local_batch, self.rank = global_batch, global_batch // world_size, rank
        self.first_step, self.first_place = first_step, first_place
        self.orders = {}                                    # the current epoch's

    def first_of(self, step):
        """The place that a step begins with."""
        return self.first_place + (step - self.first_step) * self.global_batch

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
        """Places (n,), latents as stored (n, 4 or 8, S/8, S/8), conditions (n, ...).

        One line of text in place of tensors where a file or image cannot be read: raised in a reader, an error would
        come with that one's traceback as its text.
        """
        first = self.first_of(step) + self.rank * self.local_batch
        places = np.arange(first, first + self.local_batch)
        try:
            return torch.from_numpy(places), *self.gather(self.rows(places))
        except (ValueError, OSError) as error:
            return str(error)

    def gather(self, rows):
        """Latents and conditions of feature rows, tensors."""
        condition = self.condition.gather(rows, limit=self.limit)
        # uint16 codes as int32: torch can do little with uint16
        condition = condition.astype(np.int32) if condition.dtype == np.uint16 else condition
        return torch.from_numpy(self.features.latents.gather(rows)), torch.from_numpy(condition)


def open_vectors(path, count):
    """The `Stack` of a folder of `.npy` (n, in_dim), count rows in all. Raises ValueError where it is not that."""
    paths = sorted(Path(path).glob("*.npy"), key=file_order)
    if not paths:
        raise ValueError(f"--condition-path {path} is not a folder of .npy files")
    vectors = Stack(paths, sample_ndim=1, load=load_floats)
    if len(vectors) != count:
        raise ValueError(f"--condition-path {path} has {len(vectors)} rows, the data {count}")
    return vectors


def draw_posterior(moments, seed, places):
    """Latents (n, 4, h, w) drawn from moments (n, 8, h, w), anew at each place in the row of epochs."""
    mean, std = moments.chunk(2, dim=1)
    return mean + std * normal(seed, Stream.TRAIN_POSTERIOR, places, mean.shape[1:])


#################################################################################
#                                   Sharding                                    #
#################################################################################

def shard(model, device):
    """Shard a model's parameters over the processes, in place, block by block (FSDP2, torch's fully_shard)."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for part in (*model.blocks, model):
        fully_shard(part, mesh=mesh)


@torch.no_grad()
def local(parameters):
    """What of each parameter lies in this process: all of it, or its shard."""
    return [parameter.to_local() if isinstance(parameter, DTensor) else parameter for parameter in parameters]


#################################################################################
#                                Request to stop                                #
#################################################################################

ASKED = 1000                # beside the signals' numbers: a process asked to stop for a reason of its own


class StopRequest:
    """A request to stop after a step: Ctrl-C; SIGTERM and SIGUSR1, which clusters send before they take a machine away; or
    `ask`, in any process.

    The processes get the signal at different moments and must stop after the same step, so at each step they tell each
    other on the CPU, and read what was told at the step before: nobody waits.

    Attributes: reason, what this process asked to stop for, None where it did not.
    """

    def __init__(self, num_processes):
        self.signal, self.reason, self.told, self.telling = None, None, None, None
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE) if num_processes > 1 else None
        on_first_signal(STOPPING, self._receive)

    def _receive(self, number):
        self.signal = self.signal or number

    def ask(self, reason):
        """Stop all processes after this step or the next, with a checkpoint: for an error that leaves time for one."""
        self.signal, self.reason = ASKED, self.reason or reason

    def agreed(self):
        """What all processes are to stop for, a signal's name or "an error", else None. Called by all after each step."""
        number = self.signal or 0
        if self.group is not None:
            told, telling = self.told, self.telling
            self.told = torch.tensor([number])
            self.telling = dist.all_reduce(self.told, dist.ReduceOp.MAX, group=self.group, async_op=True)
            number = 0
            if telling is not None:
                telling.wait()
                number = told.item()
        return None if not number else "an error" if number == ASKED else signal.Signals(number).name


#################################################################################
#                                    Record                                     #
#################################################################################

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


def steps_from(loader, batches, steps, stop_request):
    """The loader's batch of each of these steps; should one of its readers be killed, batches read here from then on.

    The kernel kills a reader where memory is short. All processes then stop with a checkpoint, but until they have
    agreed on it this one must take part in their steps.
    """
    iterator = iter(loader)
    # torch raises this in the midst of whatever runs; without its handler it is noticed where a batch is waited for
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for step in steps:
        if stop_request.reason is None:
            try:
                yield next(iterator)
                continue
            except (RuntimeError, ConnectionError, EOFError) as error:
                if not is_killed_reader(error):
                    raise
                stop_request.ask("a data reader was killed, by the kernel where memory or /dev/shm is short: lower "
                                 "--num-workers")
        yield batches[step]


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
    samples = sample_latents(ema, create_sampler("ddpm", PREVIEW_STEPS), y, seed, indices, latents.shape[1:], PREVIEW_CFG)
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

"""draw_missing of the sampling scripts, in this process, with a small untrained model and VAE."""

import types

import numpy as np
import torch

from dlc.machine.part import WHOLE
from dlc.sampling.command import draw_missing
from dlc.sampling.latents import create_sampler
from models import DiTSEM

STEPS = 3


def draw(folder, model, vae, *, batch=2, batches=3, compile=False, interval=(0, 999), sampler="ddim"):
    """Draw the images batch by batch into a folder that exists."""
    count = batch * batches
    record = types.SimpleNamespace(
        num_fid_samples=count,
        precision="fp32",
        global_seed=0,
        cfg_scale=2.0,
        t_min=interval[0],
        t_max=interval[1],
        cfg_channels=4,
    )
    job = types.SimpleNamespace(  # a Job, as far as drawing uses it
        state=types.SimpleNamespace(
            device=torch.device("cpu"), num_processes=1, process_index=0, is_main_process=False
        ),
        model=model.eval(),
        sampler=create_sampler(sampler, STEPS),
        conditions=lambda indices: torch.zeros(len(indices), 3, dtype=torch.long),
        vae=vae,
        record=record,
        folder=types.SimpleNamespace(path=folder, batch=batch, block=batch, part=WHOLE),
        missing=np.arange(count),
        guide=None,
    )
    args = types.SimpleNamespace(
        per_proc_batch_size=batch,
        tf32=True,
        precision="fp32",
        compile=compile,
        cuda_graphs=False,
        vae_precision="fp32",
        progressive=None,
    )
    draw_missing(job, args)


def tiny_model():
    return DiTSEM(input_size=4, patch_size=2, hidden_size=24, depth=2, num_heads=2, L=3, V=5)

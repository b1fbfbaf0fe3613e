"""A small untrained prior, on disk as train_prior.py leaves one."""

import torch
from conftest import L, V, save_untrained

from diffusion.process_table import create_process
from prior import DLCPrior_models


def save_prior(path, spread=0.1, weights=("ema", "model"), num_classes=None, **recorded):
    """Write a checkpoint directory whose every weight is random, so that its distributions are far from uniform.

    recorded: further keys of meta.json.
    """
    torch.manual_seed(0)
    sizes = dict(L=L, V=V, num_classes=num_classes, shared_embedding=False, scale_by_sigma=False)
    sizes.update({key: recorded.pop(key) for key in ("L", "V") if key in recorded})
    model = DLCPrior_models["DLCPrior-Ti"](**sizes)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=spread)
    process = create_process("masked", V=sizes["V"], masking="counted", time_conditioning=False)
    settings = dict(features_count=9, global_batch_size=1, global_seed=0, **recorded)
    notes = dict(precision="fp32", lr=0.0, weight_decay=0.0, ema_decay=0.0, versions={})
    return save_untrained(path, "DLCPrior-Ti", model, process, settings, notes, weights, step=3, place=0)

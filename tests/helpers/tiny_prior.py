"""A small untrained prior, on disk as train_prior.py leaves one."""

import json

import safetensors.torch
import torch
from conftest import L, V

from diffusion.process_table import create_process
from dlc.weights.meta import RunMeta, config_of
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
    path.mkdir(parents=True)
    for name in weights:
        safetensors.torch.save_file(model.state_dict(), path / f"{name}.safetensors")
    process = create_process("masked", V=sizes["V"], masking="counted", time_conditioning=False)
    meta = RunMeta.of_run(
        dict(features_count=9, global_batch_size=1, global_seed=0, **recorded),
        dict(precision="fp32", lr=0.0, weight_decay=0.0, ema_decay=0.0, versions={}),
        **dict(step=3, place=0, logged=0, skipped=0),
    )
    for name, record in (("config", config_of("DLCPrior-Ti", model, process)), ("meta", meta)):
        (path / f"{name}.json").write_text(json.dumps(record.to_json()))
    return path

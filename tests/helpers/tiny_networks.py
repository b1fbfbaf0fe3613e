"""evaluate.py with a small network in Inception's place, and small inputs: the real script in little time."""

import numpy as np
import torch
from PIL import Image

from evaluation.feature_networks import NETWORKS


class TinyInception:
    """A random layer on the colours of 4 x 4 cells: 12 features, 6 spatial ones, 5 classes. Any file is its weights."""

    name, outputs = "inception", dict(pool=12, spatial=6)
    files, url, sha256_prefix = ("tiny.bin",), "http://127.0.0.1:9/tiny.bin", ""

    def __init__(self, path, device):
        self.path, self.device, self.notes = path, device, []
        self.digest = f"{sum(open(path, 'rb').read()):064d}"
        torch.manual_seed(0)
        self.module = torch.nn.Linear(48, 18)

    def __call__(self, images):
        images = images.to(self.device).permute(0, 3, 1, 2).to(self.module.weight.dtype) / 255
        with torch.no_grad():
            found = torch.sigmoid(self.module(torch.nn.functional.adaptive_avg_pool2d(images, 4).flatten(1))).float()
        return dict(pool=found[:, :12], spatial=found[:, 12:])

    def probabilities(self, pool):
        return torch.softmax(30 * pool[:, :5], dim=1)


def main():
    import evaluate

    NETWORKS["inception"] = TinyInception
    evaluate.main()


def pixels(count, size=16, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def save_folder(folder, arrays, ending="png"):
    folder.mkdir(parents=True)
    for index, array in enumerate(arrays):
        Image.fromarray(array).save(folder / f"{index:06d}.{ending}")
    return folder


def record_of(count, **changes):
    """A samples.json, as far as evaluation reads it."""
    common = dict(format_version=1, model="DiTSEM-XL/2", step=7, weights="ema", cfg_scale=1.5, cfg_channels=4)
    return (
        dict(common, num_fid_samples=count, sampler="ddpm", num_sampling_steps=250, global_seed=3, labels=[0]) | changes
    )


def tiny_dinov2(path, width=64, depth=2, side=37):
    """Seeded weights of a small ViT in DINOv2's names, with its mask token."""
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(1)
    module = VisionTransformer(
        img_size=side * 14, patch_size=14, embed_dim=width, depth=depth, num_heads=1, init_values=0.5, num_classes=0
    )
    weights = {key: torch.randn_like(value) * 0.1 for key, value in module.state_dict().items()}
    torch.save({**weights, "mask_token": torch.zeros(1, width)}, path)
    return weights

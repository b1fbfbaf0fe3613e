"""A judge of the emoji that did not make their codes: a small classifier of their groups, fitted to real pictures."""

from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from demo.networks import BATCH, Distortion, pixels_of
from dlc.machine.cli import progress
from dlc.machine.files import write_whole

STEPS, FIT_BATCH, LR, SEED = 800, 64, 3e-3, 0
FEATURES = 24  # numbers of its last hidden layer: few, because their covariance is measured on about 200 images


class GroupReader:
    """Reads the group of images: a convolutional network, fitted to real ones and their labels.

    Args:
        images, labels: (n, S, S, 3) uint8 and (n,) int64, the training images.
        path: the fitted weights are written to this file, and read from there where it exists.
    """

    def __init__(self, images: np.ndarray, labels: np.ndarray, path: Path):
        torch.manual_seed(SEED)
        layers, channels = [], 3
        for width, kernel in ((24, 5), (48, 3), (96, 3)):
            layers += [nn.Conv2d(channels, width, kernel, stride=2, padding=kernel // 2), nn.GroupNorm(8, width)]
            layers, channels = [*layers, nn.SiLU()], width
        self.trunk = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(16 * channels, FEATURES))
        self.head = nn.Linear(FEATURES, int(labels.max()) + 1)
        self.modules = nn.ModuleList([self.trunk, self.head])
        if path.exists():
            self.modules.load_state_dict(torch.load(path, weights_only=True))
        else:
            self._fit(torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64)))
            write_whole(path, lambda file: torch.save(self.modules.state_dict(), file))

    def _fit(self, images, labels):
        generator, distort = torch.Generator().manual_seed(SEED), Distortion(images)
        optimizer = torch.optim.AdamW(self.modules.parameters(), lr=LR, weight_decay=0.05)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=STEPS)
        for _ in progress(range(STEPS), desc="fitting the judge", unit="step"):
            rows = torch.randint(len(images), (FIT_BATCH,), generator=generator)
            features = self.trunk(distort(pixels_of(images[rows]), generator))
            loss = F.cross_entropy(self.head(F.dropout(F.silu(features), 0.2)), labels[rows], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

    @torch.inference_mode()
    def features(self, images: np.ndarray) -> np.ndarray:
        """Images (n, S, S, 3) uint8 to (n, FEATURES) float32."""
        return torch.cat([self.trunk(pixels_of(part)) for part in torch.from_numpy(images).split(BATCH)]).numpy()

    @torch.inference_mode()
    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Images (n, S, S, 3) uint8 to the labels that they look like, (n,) int64."""
        return self.head(F.silu(torch.from_numpy(self.features(images)))).argmax(dim=1).numpy()

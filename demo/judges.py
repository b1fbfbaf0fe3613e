"""What judges the demos' samples: classifiers of real pictures, and features that did not make the codes."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.svm import SVC

from demo.networks import BATCH, Distortion, pixels_of
from dlc.machine.cli import progress
from dlc.machine.files import write_whole
from dlc.weights.networks import load_encoder
from evaluation.metrics import FeatureStatistics, frechet_distance
from evaluation.tokens import EncoderNetwork, token_agreement

if TYPE_CHECKING:
    from demo.table import Demo

DIRECTIONS = 20  # they hold 89% of the variance of the train digits' scans
STEPS, FIT_BATCH, LR, SEED = 800, 64, 3e-3, 0
FEATURES = 24  # numbers of the last hidden layer: few, because their covariance is measured on about 200 images


def thumbnails(images: np.ndarray, side: int = 16) -> np.ndarray:
    """Images (n, S, S, 3) uint8 to (n, side * side * 3) in 0..1: averages over squares."""
    cell = images.shape[1] // side
    return images.reshape(len(images), side, cell, side, cell, 3).mean(axis=(2, 4)).reshape(len(images), -1) / 255


def scans(images: np.ndarray) -> np.ndarray:
    """Digits (n, 64, 64, 3) uint8 back to scans (n, 64) in 0..1."""
    return thumbnails(images, 8).reshape(len(images), -1, 3).mean(axis=2)


class MainDirections:
    """The DIRECTIONS directions in which rows (n, k) = space(images) vary most: images to coordinates there."""

    def __init__(self, images: np.ndarray, space: Callable[[np.ndarray], np.ndarray]):
        self.space, rows = space, space(images)
        self.mean = rows.mean(axis=0)
        self.axes = np.linalg.svd(rows - self.mean, full_matrices=False)[2][:DIRECTIONS].T  # (k, DIRECTIONS)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return (self.space(images) - self.mean) @ self.axes


class DigitReader:
    """Reads the digits on images (n, 64, 64, 3) uint8: a support vector machine on scans, fitted to real ones."""

    def __init__(self, images: np.ndarray, labels: np.ndarray):
        self.svc = SVC(C=10, gamma="scale").fit(scans(images), labels)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return self.svc.predict(scans(images))


class GroupReader:
    """Reads the group of images (n, S, S, 3) uint8: a convolutional network, fitted to real ones and their labels.

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
        return self.head(F.silu(torch.from_numpy(self.features(images)))).argmax(dim=1).numpy()


class Judge:
    """Gives the numbers of a set of images, by the column's name."""

    def __init__(self, demo: "Demo"):
        self.V = demo.features.V
        self.read_code = EncoderNetwork(load_encoder(demo.features.manifest.encoder), torch.device("cpu"))
        images, _, labels = demo.real("train")
        if demo.what == "digits":
            self.read = DigitReader(images, labels)
            self.spaces = dict(frechet_distance=MainDirections(images, scans))
        else:
            self.read = GroupReader(images, labels, demo.folder / "judge.pt")
            self.spaces = dict(frechet_distance=self.read.features, pca_distance=MainDirections(images, thumbnails))
        self.train = {name: FeatureStatistics.of(space(images)) for name, space in self.spaces.items()}

    def __call__(self, name: str, images: np.ndarray, codes: np.ndarray | None, labels: np.ndarray | None) -> dict:
        numbers = dict(name=name, images=len(images))
        for space, features in self.spaces.items():
            numbers[space] = frechet_distance(self.train[space], FeatureStatistics.of(features(images)))
        if codes is not None:
            found = self.read_code(torch.from_numpy(images))["codes"].numpy()
            agreement = token_agreement(codes.astype(np.int64), found, self.V)
            numbers.update(code_agreement=agreement["share"], chance=agreement["chance"])
        if labels is not None:
            numbers["read_as_asked"] = float((self.read(images) == labels).mean())
        numbers["sharpness"] = float(np.abs(np.diff(images.astype(np.int16), axis=2)).mean())
        return numbers

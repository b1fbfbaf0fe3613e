"""What every evaluation checks before its work: the arithmetic on this machine, and the network on this device."""

import copy

import numpy as np
import torch

from evaluation.metrics import FeatureStatistics, frechet_distance, inception_score, precision_recall
from evaluation.networks import probe_image

# Of the sets that `stored_sets` makes, by this program on a CPU; NumPy's and SciPy's ways give the same.
RECORDED = dict(distance=0.5234831267596824, precision=95 / 96, recall=77 / 96, score=1.149668778296041)
ROUNDING = 1e-4  # of a network's features in float32 against float64, relative; TF32 has 1e-3
SAME_NETWORK = 1e-3  # of two machines' features of the probe, relative


def stored_sets() -> tuple[torch.Tensor, torch.Tensor]:
    """Two sets of 96 features of 12 dimensions, from integers alone, so that they are the same everywhere."""
    n, d = np.meshgrid(np.arange(96), np.arange(12), indexing="ij")
    one = (n * n * 31 + d * d * 17 + n * d * 7) % 101
    other = (n * n * 29 + d * d * 13 + n * d * 5 + 40) % 97
    return torch.from_numpy(one / 50.0).float(), torch.from_numpy(other / 55.0).float()


def arithmetic() -> dict[str, float]:
    """Every metric of the stored sets, and the distance of one to itself."""
    one, other = stored_sets()
    statistics = [FeatureStatistics.of(rows) for rows in (one, other)]
    precision, recall = precision_recall(one, other)
    return dict(
        distance_to_itself=frechet_distance(statistics[0], statistics[0]),
        distance=frechet_distance(*statistics),
        precision=precision,
        recall=recall,
        score=inception_score(torch.softmax(one.double(), dim=1), split_size=40),
    )


def check_arithmetic() -> float:
    """The distance of a stored set to itself. Raises ValueError where a metric is not what was recorded."""
    found = arithmetic()
    itself = found.pop("distance_to_itself")
    wrong = [
        f"{name} {value:.9g}, wanted {RECORDED[name]:.9g}"
        for name, value in found.items()
        if abs(value - RECORDED[name]) > 1e-6 * abs(RECORDED[name])
    ]
    if abs(itself) > 1e-9:
        wrong.append(f"the distance of a set to itself {itself:g}, wanted 0")
    if wrong:
        raise ValueError(
            f"the self-check fails: this machine computes {'; '.join(wrong)}: its PyTorch cannot be trusted"
        )
    return itself


@torch.inference_mode()
def check_network(network, reference) -> tuple[np.ndarray, float]:
    """A network's features of the probe image (D,), and their relative error against float64 on the CPU.

    Raises ValueError where that is more than rounding, or where the reference records other features of the probe.
    """
    image = torch.from_numpy(probe_image())
    found = network(image)["pool"][0].cpu().double()
    exact = copy.copy(network)
    exact.module, exact.device = copy.deepcopy(network.module).cpu().double(), torch.device("cpu")
    wanted = exact(image)["pool"][0].double()
    error = float((found - wanted).norm() / wanted.norm())
    if not error < ROUNDING:
        raise ValueError(
            f"the self-check fails: {network.name}'s features on {network.device} differ by {error:.1e} from those in "
            "float64, more than float32 rounds: is TF32 or another library's setting on?"
        )
    recorded = reference.probe if reference is not None and reference.network == network.name else None
    if recorded is not None:
        apart = (
            np.linalg.norm(found.numpy() - recorded) / np.linalg.norm(recorded) if len(recorded) == len(found) else 1
        )
        if not apart < SAME_NETWORK:
            raise ValueError(
                f"--reference {reference.path} was made with other weights of {network.name} than {network.path}: its "
                f"record of a fixed image's features differs by {apart:.1e}"
            )
    return found.numpy(), error

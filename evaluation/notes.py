"""Warnings of known mistakes that lead to wrong published numbers, as lines."""

from collections.abc import Iterable

from evaluation.measuring import Measured
from evaluation.metrics import METRICS
from evaluation.reference import Reference
from evaluation.sets import ImageSet
from models import DiT_models

PUBLISHED_SAMPLES, PUBLISHED_REFERENCE = 50_000, 10_000  # images of ADM's protocol: samples; arr_0 of a reference
SORTED = 0.9  # of the Inception Score in random order: below it, the order of the files decides the score
EXAMPLES = 3


def listed(items: list[str]) -> str:
    """The first of some words."""
    return f"{', '.join(items[:EXAMPLES])}{', …' if len(items) > EXAMPLES else ''}"


def of_counts(samples: int, width: int, reference: Reference, metrics: Iterable[str]) -> list[str]:
    """Warnings of sets that are too small, or of other sizes than in the published protocol.

    Args:
        samples: how many.
        width: of the widest features with a Frechet distance, 2048 of Inception; 0 where no distance is wanted.
    """
    lines, count = [], reference.images and reference.images.count
    if samples < width:
        lines.append(
            f"{samples:,} samples are too few for a Frechet distance: the covariance of {width:,} features needs as "
            f"many images, and papers use {PUBLISHED_SAMPLES:,}"
        )
    elif samples != PUBLISHED_SAMPLES:
        lines.append(
            f"{samples:,} samples: published numbers use {PUBLISHED_SAMPLES:,}"
            + (", and fewer give a larger distance" if width else "")
        )
    if width and count is not None and not reference.statistics and count != samples:
        lines.append(
            f"the reference is {count:,} images of {reference.path} and the samples are {samples:,}: "
            "published FIDs compare with the statistics of a whole data set, which ADM's files store as mu and sigma"
        )
    balls = sorted(name for name in metrics if METRICS[name].neighbours)
    if balls and count is not None and count != PUBLISHED_REFERENCE:
        lines.append(f"{', '.join(balls)}: {count:,} reference images; published numbers use {PUBLISHED_REFERENCE:,}")
    return lines


def of_record(record: dict) -> list[str]:
    """Warnings of settings in samples.json that published samples do not have."""
    lines, spec = [], DiT_models.get(str(record.get("model")))
    channels, scale = record.get("cfg_channels"), record.get("cfg_scale")
    if spec is not None and isinstance(scale, (int, float)) and scale > 1 and isinstance(channels, int):
        published = spec.family.guided_channels  # None: all
        if channels != published if published else channels == 3:
            lines.append(
                f"guidance covers {channels} latent channels: the published samples of {record['model']} guide "
                f"{published or 'all of them'} (--cfg-channels {published or 'all'})"
            )
    if record.get("weights") in ("raw", "model"):
        lines.append("the samples were drawn from the raw weights: published ones from the EMA weights")
    elif record.get("weights") == "as in the file":
        lines.append(
            "samples.json does not say whether the weights are the EMA weights, which published samples were drawn from"
        )
    return lines


def of_images(samples: ImageSet, reference: Reference) -> list[str]:
    """Warnings of the files and sizes of images."""
    lines = []
    for name, images in (("samples", samples), ("reference images", reference.images)):
        if images is not None and images.jpeg:
            lines.append(
                f"{images.jpeg:,} of the {name} are JPEG files, whose compression changes the features: use PNG or .npz"
            )
    if reference.images is not None and reference.images.size != samples.size:
        there, here = (f"{width} x {height}" for height, width in (reference.images.size, samples.size))
        lines.append(f"the reference has {there} pixels, the samples have {here}: their distances mean little")
    side = getattr(samples, "crop", None) or getattr(samples, "resize", None)
    if side:
        lines.append(f"the samples were brought to {side} x {side} pixels before they were compared")
    return lines


def of_pixels(measured: Measured, reference: Reference, compared: Measured) -> list[str]:
    """Warnings of the images' content, which a pass over them found, and over those that they are compared with."""
    lines = []
    if measured.digest in (reference.sha256, compared.digest):
        lines.append(f"the samples and {reference.path} are the same images: a set has no distance from itself")
    if measured.twins:
        pairs = listed([f"{one} = {other}" for one, other in measured.twins])
        lines.append(f"{len(measured.twins):,} samples equal an earlier one ({pairs})")
    if measured.blank:
        lines.append(f"{len(measured.blank):,} samples have one colour ({listed(list(map(str, measured.blank)))})")
    return lines


def of_order(values: dict[str, float]) -> list[str]:
    """A warning where the order of the samples lowers their Inception Score, as one sorted by class does."""
    score, shuffled = values.get("inception_score", 0), values.get("inception_score_shuffled", 0)
    if score >= SORTED * shuffled:
        return []
    return [
        f"the Inception Score is {score:.1f} in the order of the files and {shuffled:.1f} in random order: its splits "
        "are 5,000 images in that order, and the samples look sorted by class"
    ]

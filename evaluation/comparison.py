"""Samples against a reference: which passes over the images the wanted metrics need, and the metrics.

compare = Comparison(reference, networks, ("fid", "recall"), "inception", state)
result = compare(samples)
result.values                                                  # {"fid": 2.0, …}, on rank 0
"""

import os
from argparse import Namespace
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch

from dlc.machine.cli import SEED, number
from dlc.machine.processes import cores_per_process
from evaluation import notes
from evaluation.feature_networks import add_network_flags, check_weights_flags
from evaluation.measuring import Measured, Output, measure
from evaluation.metrics import ALONE, METRICS, Pair
from evaluation.reference import STORED, Reference
from evaluation.sets import ImageSet

#################################################################################
#                                     Flags                                     #
#################################################################################


def add_comparison_flags(add: Callable) -> None:
    """Add the flags of a comparison but for the samples, the reference and the output; sweep hands these on."""
    add(
        "--metrics",
        nargs="+",
        choices=METRICS,
        metavar="METRIC",
        help=f"compute these: {', '.join(METRICS)} [those of the features]",
    )
    add_network_flags(add)
    add("--crop", type=number(int, 1), help="crop the images of folders to this size as ADM does, pixels")
    add("--resize", type=number(int, 1), help="resize the images of folders to this size squared, bicubic, pixels")
    add(
        "--pr-precision",
        choices=["adm", "float32"],
        default="adm",
        help="round the distances of precision and recall to this precision; adm: float16, as in published numbers",
    )
    add("--global-seed", type=SEED, default=0, help="seed KID's subsets")


def wanted_metrics(args: Namespace) -> tuple[str, ...]:
    """The names of the metrics that the flags ask for, in the order of METRICS."""
    return tuple(
        name
        for name, one in METRICS.items()
        if (name in args.metrics if args.metrics else one.is_default and one.network in (None, args.features))
    )


def check_comparison_flags(args: Namespace) -> None:
    """Raise ValueError for flags that contradict each other, or that nothing would read."""
    if args.crop and args.resize:
        raise ValueError("--crop and --resize exclude each other: give one")
    metrics = wanted_metrics(args)
    check_weights_flags(args, networks_of(metrics, args.features))
    if args.pr_precision != "adm" and not {"precision", "recall"} & set(metrics):
        raise ValueError(
            f"--pr-precision {args.pr_precision} applies to precision and recall only: add them to --metrics"
        )


def networks_of(metrics: Iterable[str], features: str) -> list[str]:
    """The names of the networks that metrics need. features: the network of those that are tied to none."""
    return list(dict.fromkeys(METRICS[name].network or features for name in metrics))


def needs_reference(metrics: Iterable[str]) -> bool:
    """Whether some of the metrics compare samples with a reference."""
    return any(METRICS[name].needs not in ALONE for name in metrics)


def check_reference(reference: Reference, metrics: Iterable[str], features: str) -> None:
    """Raise ValueError where a reference of statistics alone cannot give what the metrics need."""
    there = []
    for name in metrics:
        row = METRICS[name]
        stored = row.needs == "statistics" and reference.stored(row.network or features, row.output) is not None
        if stored or reference.images is not None or row.needs in ALONE:
            there.append(name)
    if lacking := [name for name in metrics if name not in there]:
        arrays = ", ".join(array for output in reference.statistics for array in STORED[output])
        remedy = f"--metrics {' '.join(there)}, or " if there else ""
        raise ValueError(
            f"--reference {reference.path} holds {arrays} of {reference.network} alone, too little for "
            f"{', '.join(lacking)}: give {remedy}a reference with arr_0"
        )


#################################################################################
#                                 The comparison                                #
#################################################################################


@dataclass
class Result:
    """values: {key of metrics.json: number}. warnings: lines. samples, reference: what was measured of each."""

    values: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    samples: Measured | None = None
    reference: Measured | None = None


@dataclass
class Comparison:
    """Measures a reference and samples, and computes the wanted metrics of both.

    Args:
        reference: from `open_reference`; `Reference(None)` where no metric needs one.
        networks: {name: network} of `networks_of`.
        metrics: keys of METRICS.
        features: the network of those metrics that are tied to none.
        state: accelerate's PartialState.
        pr_precision: see `precision_recall`.
        seed: of KID's subsets, and of the shuffle that shows whether the order decides the Inception Score.
        batch_size: images per batch of a network; None: see `measure`.

    Raises ValueError where the reference cannot give what a metric needs.
    """

    reference: Reference
    networks: dict
    metrics: tuple[str, ...]
    features: str
    state: object
    pr_precision: str = "adm"
    seed: int = 0
    batch_size: int | None = None

    def __post_init__(self):
        for name, output in self.distances():
            stored, network = self.reference.stored(name, output), self.networks[name]
            digest = self.reference.network_sha256
            if stored is not None and stored.dim != network.outputs[output]:
                raise ValueError(
                    f"--reference {self.reference.path} has statistics of {stored.dim} features, and {name}'s {output} "
                    f"features are {network.outputs[output]}"
                )
            if stored is not None and digest not in (None, network.digest):
                raise ValueError(
                    f"--reference {self.reference.path} was made with other weights of {name} ({digest[:8]}…) than "
                    f"these ({network.digest[:8]}…)"
                )

    def needed(self, *needs: str) -> list[Output]:
        """(network, output) of the wanted metrics that need one of these attributes of a Pair, each once."""
        rows = [METRICS[name] for name in self.metrics]
        return list(dict.fromkeys((one.network or self.features, one.output) for one in rows if one.needs in needs))

    def distances(self) -> list[Output]:
        """(network, output) of each Frechet distance that is wanted."""
        return self.needed("statistics")

    def warnings_of(self, samples: ImageSet) -> list[str]:
        """Warnings before any work. Raises ValueError for fewer images than a metric needs."""
        there = self.reference.images and self.reference.images.count
        for name in self.metrics:
            fewest = max(2, METRICS[name].neighbours + 1)
            for count, whose in ((samples.count, "samples"), (there, "reference images")):
                if count is not None and count < fewest:
                    raise ValueError(
                        f"--metrics {name} needs at least {fewest} images in each set, and there are {count} {whose}"
                    )
        width = max((self.networks[name].outputs[output] for name, output in self.distances()), default=0)
        return [
            *notes.of_counts(samples.count, width, self.reference, there, self.metrics),
            *notes.of_record(samples.record or {}),
            *notes.of_images(samples, self.reference),
            *(line for network in self.networks.values() for line in network.notes),
        ]

    def __call__(self, samples: ImageSet) -> Result:
        """Measure both sets, in all processes, and compute the metrics on rank 0; elsewhere an empty Result."""
        stored = {key: self.reference.stored(*key) for key in self.distances()}
        lacking, features = [key for key, one in stored.items() if one is None], self.needed("features")
        if lacking or features:
            reference = self._measure(self.reference.images, lacking, features, "reference")
        else:
            reference = Measured(0)
        reference.statistics.update({key: one for key, one in stored.items() if one is not None})
        kept = self.needed("features", *ALONE)
        measured = self._measure(samples, self.distances(), kept, "samples")
        if not self.state.is_main_process:
            return Result()
        threads = torch.get_num_threads()
        torch.set_num_threads(cores_per_process() * int(os.environ.get("LOCAL_WORLD_SIZE", 1)))  # the others wait
        try:
            values = self._values(reference, measured)
        finally:
            torch.set_num_threads(threads)
        warnings = notes.of_pixels(measured, self.reference, reference) + notes.of_order(values)
        return Result(values, warnings, measured, reference)

    def _measure(self, images, statistics, kept, desc):
        used = {name for name, _ in [*statistics, *kept]}
        networks = [one for name, one in self.networks.items() if name in used]
        keep = dict.fromkeys(kept, torch.float32)
        return measure(images, networks, self.state, statistics, keep, self.batch_size, desc)

    def _values(self, reference: Measured, samples: Measured) -> dict[str, float]:
        values = {}
        for network in self.networks:
            pair = self._pair(network, reference, samples)
            for row, name in ((METRICS[name], name) for name in self.metrics):
                if (row.network or self.features) == network:
                    found = row.function(pair)
                    values.update(found if isinstance(found, dict) else {row.key or name: found})
        return values

    def _pair(self, network: str, reference: Measured, samples: Measured) -> Pair:
        """Both sets as one network sees them."""
        pair = Pair(pr_precision=self.pr_precision, seed=self.seed)
        for name, output in self.distances():
            if name == network:
                pair.statistics[output] = reference.statistics[name, output], samples.statistics[name, output]
        key = network, "pool"
        if key in self.needed("features"):
            pair.features = tuple(one.rows[key].to(self.state.device) for one in (reference, samples))
        if key in self.needed("samples"):
            pair.samples = samples.rows[key].to(self.state.device)
        if key in self.needed("probabilities"):
            pair.probabilities = self.networks[network].probabilities(samples.rows[key])
        return pair

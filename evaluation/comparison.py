"""Samples against a reference: which passes the wanted metrics need, and the metrics.

comparison = Comparison(reference, networks, metrics, state)   # the reference is measured once
result = comparison(samples)                                   # for any number of sets of samples
result.values                                                  # {"fid": 2.0, …}, on rank 0
"""

import os
from dataclasses import dataclass, field

import torch

from dlc.machine.processes import cores_per_process
from evaluation import notes
from evaluation.feature_file import NAME as FEATURE_FILE
from evaluation.measuring import Measured, measure
from evaluation.metrics import density_coverage, frechet_distance, inception_score, kernel_distance, precision_recall
from evaluation.reference import Reference
from evaluation.sets import ImageSet

SPLIT_SIZE = 5000  # rows of a split of the Inception Score, in the order of the samples: ADM's
K_PRECISION, K_DENSITY = 3, 5  # nearest neighbours, of ADM and of the paper on density and coverage
FEWEST = dict(precision=K_PRECISION + 1, recall=K_PRECISION + 1, density=K_DENSITY + 1, coverage=K_DENSITY + 1)
# --metrics: what each needs, of the features that --features names unless another network is named
METRICS = {
    "fid": "statistics",
    "sfid": "spatial",
    "is": "probabilities",
    "precision": "features",
    "recall": "features",
    "kid": "features",
    "density": "features",
    "coverage": "features",
    "fd_dinov2": "dinov2",
}
DEFAULTS = {
    "inception": ("fid", "sfid", "is", "precision", "recall"),
    "dinov2": ("fid", "precision", "recall"),
    FEATURE_FILE: ("fid", "sfid", "is", "precision", "recall"),
}
# the name of the Frechet distance, by network
DISTANCES = {"inception": "fid", "dinov2": "fd_dinov2", FEATURE_FILE: "fd"}


def networks_of(features: str, metrics) -> list[str]:
    """The networks that metrics need; that of --features, where it is one of them, comes first."""
    needs = {METRICS[name] for name in metrics}
    return list(dict.fromkeys([*([features] if needs - {"dinov2"} else []), *(needs & {"dinov2"})]))


def needs_reference(metrics) -> bool:
    """Whether some of the metrics compare samples with a reference."""
    return any(METRICS[name] != "probabilities" for name in metrics)


@dataclass
class Result:
    """values: {key of metrics.json: number}. warnings: lines. samples, reference: what was measured of each."""

    values: dict[str, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    samples: Measured | None = None
    reference: Measured | None = None


class Comparison:
    """Measures a reference, once, and sets of samples against it.

    Args:
        reference: from `open_reference`; `Reference(None)` where no metric needs one.
        networks: {name: network} of `networks_of`.
        metrics: keys of METRICS.
        state: accelerate's PartialState.
        pr_precision: see `precision_recall`.
        seed: of KID's subsets, and of the shuffle that shows whether the order decides the Inception Score.
        batch_size: images per batch of a network; None: see `measure`.
        measured: of the reference, where somebody else measured it.

    Raises ValueError where the reference cannot give what a metric needs.
    """

    def __init__(
        self,
        reference: Reference,
        networks,
        metrics,
        state,
        pr_precision: str = "adm",
        seed: int = 0,
        batch_size: int | None = None,
        measured: Measured | None = None,
    ):
        self.reference, self.networks, self.state = reference, networks, state
        self.metrics = tuple(dict.fromkeys(metrics))
        self.main = next(iter(networks))
        self.pr_precision, self.seed, self.batch_size = pr_precision, seed, batch_size
        self.needs = {METRICS[name] for name in self.metrics}
        self.measured = measured
        self._check()
        if measured:
            self._use_stored()

    def _check(self):
        """Raise ValueError where a metric asks for what the network or the reference does not have."""
        main = self.networks[self.main]
        if "spatial" in self.needs and "spatial" not in main.outputs:
            raise ValueError(f"--metrics sfid needs spatial features, and --features {self.main} has none")
        if "probabilities" in self.needs and main.probabilities is None:
            raise ValueError(f"--metrics is needs class probabilities, and --features {self.main} has none")
        for name, output in self.distances():
            if self.measured is None or self.reference.statistics:
                self._check_stored(name, output)
        if "features" in self.needs and self.reference.images is None and self.measured is None:
            raise ValueError(
                f"--reference {self.reference.path} holds statistics alone, and {self._names('features')} need its "
                "images: leave them out of --metrics, or give a reference with arr_0"
            )

    def _check_stored(self, name, output):
        """Raise ValueError where neither stored statistics nor images give the reference's side of a distance."""
        path, network = self.reference.path, self.networks[name]
        stored, digest = self.reference.stored(name, output), self.reference.network_sha256
        if stored is None and self.reference.images is None:
            raise ValueError(
                f"--reference {path} has no images, and no statistics of {name}'s {output} features: its statistics "
                f"are {self.reference.network}'s {' and '.join(self.reference.statistics)}"
            )
        if stored is not None and stored.dim != network.outputs[output]:
            raise ValueError(
                f"--reference {path} has statistics of {stored.dim} features, and {name}'s {output} features are "
                f"{network.outputs[output]}"
            )
        if stored is not None and digest not in (None, network.digest):
            raise ValueError(
                f"--reference {path} was made with other weights of {name} ({digest[:8]}…) than these "
                f"({network.digest[:8]}…)"
            )

    def _names(self, need):
        return ", ".join(name for name in self.metrics if METRICS[name] == need)

    def distances(self):
        """(network, output) of each Frechet distance that is wanted."""
        wanted = []
        if "statistics" in self.needs:
            wanted.append((self.main, "pool"))
        if "spatial" in self.needs:
            wanted.append((self.main, "spatial"))
        if "dinov2" in self.needs and ("dinov2", "pool") not in wanted:
            wanted.append(("dinov2", "pool"))
        return wanted

    def _pass(self, images: ImageSet, distances, keep, desc) -> Measured:
        outputs = {}
        for name, output in distances:
            outputs[name] = (*outputs.get(name, ()), output)
        networks = [one for name, one in self.networks.items() if name in outputs or name in keep]
        return measure(images, networks, self.state, keep, outputs, self.batch_size, desc)

    def measure_reference(self) -> None:
        """Run the networks over the reference's images, where its stored statistics do not suffice."""
        distances = [key for key in self.distances() if self.reference.stored(*key) is None]
        keep = (self.main,) if "features" in self.needs else ()
        if distances or keep:
            self.measured = self._pass(self.reference.images, distances, keep, "reference")
        else:
            self.measured = Measured(0)
        self._use_stored()

    def _use_stored(self):
        for key in self.distances():
            stored = self.reference.stored(*key)
            if stored is not None:
                self.measured.statistics[key] = stored

    def __call__(self, samples: ImageSet) -> Result:
        """Measure samples, in all processes, and judge them on rank 0; elsewhere an empty Result."""
        if self.measured is None:
            self.measure_reference()
        keep = (self.main,) if self.needs & {"features", "probabilities"} else ()
        measured = self._pass(samples, self.distances(), keep, "samples")
        if not self.state.is_main_process:
            return Result()
        return self.judge(measured, samples)

    def judge(self, measured: Measured, samples: ImageSet | None = None) -> Result:
        """The numbers of what was measured of samples, and warnings; on rank 0."""
        probs = None
        if "probabilities" in self.needs:
            probs = self.networks[self.main].probabilities(measured.features[self.main])
        result = self.numbers(measured, probs)
        found = notes.of_pixels(measured) if samples else []
        result.warnings = [*self.warnings_of(samples), *found, *result.warnings]
        return result

    def check_counts(self, count: int) -> int | None:
        """How many images the reference has, if it has any. Raises ValueError for fewer than a metric needs.

        count: how many samples there are, or will be.
        """
        there = self.reference.images or self.measured
        there = (there and there.count) or None
        for name in self.metrics:
            for images, whose in ((count, "samples"), (there, "reference images")):
                if images is not None and images < FEWEST.get(name, 2):
                    raise ValueError(
                        f"--metrics {name} needs at least {FEWEST.get(name, 2)} images in each set, and there are "
                        f"{images} {whose}"
                    )
        return there

    def warnings_of(self, samples: ImageSet | None) -> list[str]:
        """What is to be warned of before any work; samples None: of features of a file, which say how many they are.

        Raises ValueError for fewer images than a metric needs.
        """
        reference = self.reference
        count = samples.count if samples else self.networks[self.main].measured.count
        there = self.check_counts(count)
        width = max((self.networks[name].outputs[output] for name, output in self.distances()), default=0)
        lines = notes.of_counts(count, width, reference, there, self.metrics)
        if samples:
            lines += notes.of_record(samples.record or {}) + notes.of_images(samples, reference)
        return lines + [line for network in self.networks.values() for line in network.notes]

    def numbers(self, samples: Measured, probs: torch.Tensor | None) -> Result:
        """The wanted metrics of what was measured, on this process alone, with the cores of all that wait for it."""
        threads = torch.get_num_threads()
        torch.set_num_threads(cores_per_process() * int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        try:
            return self._numbers(samples, probs)
        finally:
            torch.set_num_threads(threads)

    def _numbers(self, samples, probs):
        result = Result(samples=samples, reference=self.measured)
        values, statistics = result.values, self.measured.statistics
        for name, output in self.distances():
            key = "sfid" if output == "spatial" else DISTANCES[name]
            values[key] = frechet_distance(statistics[name, output], samples.statistics[name, output])
        if probs is not None:
            values["inception_score"] = inception_score(probs, SPLIT_SIZE)
            if len(probs) > SPLIT_SIZE:
                order = torch.randperm(len(probs), generator=torch.Generator().manual_seed(self.seed))
                values["inception_score_shuffled"] = inception_score(probs[order], SPLIT_SIZE)
                result.warnings += notes.of_order(values["inception_score"], values["inception_score_shuffled"])
        if "features" in self.needs:
            self.neighbours(
                values, *(one.features[self.main].to(self.state.device) for one in (self.measured, samples))
            )
        return result

    def neighbours(self, values, reference, samples) -> None:
        """Add the metrics that compare features (N, D) one by one."""
        wanted = set(self.metrics)
        if wanted & {"precision", "recall"}:
            both = precision_recall(reference, samples, K_PRECISION, self.pr_precision)
            values.update({name: one for name, one in zip(("precision", "recall"), both) if name in wanted})
        if wanted & {"density", "coverage"}:
            both = density_coverage(reference, samples, K_DENSITY)
            values.update({name: one for name, one in zip(("density", "coverage"), both) if name in wanted})
        if "kid" in wanted:
            generator = torch.Generator().manual_seed(self.seed)
            values["kid"], values["kid_std"] = kernel_distance(reference, samples, generator=generator)

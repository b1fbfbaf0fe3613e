"""Samples against a reference: which passes over the images the wanted metrics need, and the metrics.

compare = Comparison(args)                                     # ValueError for what cannot be compared so
warnings = compare.open_networks(state) + compare.measure()
compare.values                                                 # {"fid": 2.0, …}, on rank 0
"""

import os
from argparse import Namespace
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch

from dlc.machine.cli import SEED, number
from dlc.machine.processes import cores_per_process
from evaluation import notes
from evaluation.feature_networks import add_network_flags, check_weights_flags, feature_networks
from evaluation.measuring import Measured, Output, measure
from evaluation.metrics import ALONE, METRICS, Pair
from evaluation.reference import STORED, Reference, open_reference
from evaluation.sets import is_npz, open_images

if TYPE_CHECKING:
    from accelerate import PartialState

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


def wanted_outputs(args: Namespace) -> dict[str, Output]:
    """The metrics that the flags ask for, in the order of METRICS: {name: the network and output it is computed of}."""
    return {
        name: (one.network or args.features, one.output)
        for name, one in METRICS.items()
        if (name in args.metrics if args.metrics else one.is_default and one.network in (None, args.features))
    }


def check_comparison_flags(args: Namespace) -> None:
    """Raise ValueError for flags that contradict each other, or that nothing would read."""
    if args.crop and args.resize:
        raise ValueError("--crop and --resize exclude each other: give one")
    wanted = wanted_outputs(args)
    check_weights_flags(args, [network for network, _ in wanted.values()])
    if args.pr_precision != "adm" and not {"precision", "recall"} & wanted.keys():
        raise ValueError(
            f"--pr-precision {args.pr_precision} applies to precision and recall only: add them to --metrics"
        )


def needs_reference(metrics: Iterable[str]) -> bool:
    """Whether some of the metrics compare samples with a reference."""
    return any(METRICS[name].needs not in ALONE for name in metrics)


#################################################################################
#                                 The comparison                                #
#################################################################################


class Comparison:
    """Measures samples and what they are compared with, and computes the wanted metrics.

    Attributes:
        samples, reference: the images; `Reference(None)` where no metric needs one.
        wanted: of `wanted_outputs`. networks: {name: network} of these, once they are open.
        found, compared: what was measured of the samples and of the reference's images. values: {key of metrics.json:
            number}. Both are complete on rank 0 alone.

    Raises ValueError for flags and files that do not go together, and where a set cannot give what a metric needs.
    """

    def __init__(self, args: Namespace):
        check_comparison_flags(args)
        self.args, self.wanted = args, wanted_outputs(args)
        comparing = needs_reference(self.wanted)
        if comparing and args.reference is None:
            raise ValueError("--reference is missing: name an .npz or a folder of images to compare with")
        if (args.crop or args.resize) and all(one is None or is_npz(one) for one in (args.samples, args.reference)):
            raise ValueError("--crop and --resize do not apply to .npz, which SAMPLES and --reference are")
        self.samples = open_images(args.samples, "SAMPLES", args.crop, args.resize)
        self.reference = open_reference(args.reference, args.crop, args.resize) if comparing else Reference(None)
        self.networks, self.values = {}, {}
        lacking = [name for name in self.wanted if not self._is_there(name)]
        if lacking:
            arrays = ", ".join(array for output in self.reference.statistics for array in STORED[output])
            there = [name for name in self.wanted if name not in lacking]
            remedy = f"--metrics {' '.join(there)}, or " if there else ""
            raise ValueError(
                f"--reference {self.reference.path} holds {arrays} of {self.reference.network} alone, too little for "
                f"{', '.join(lacking)}: give {remedy}a reference with arr_0"
            )
        for name in self.wanted:
            fewest = max(2, METRICS[name].neighbours + 1)
            for one, what in ((self.samples, "samples"), (self.reference.images, "reference images")):
                if one is not None and one.count < fewest:
                    there = f"{one.count} {what}"
                    raise ValueError(
                        f"--metrics {name} needs at least {fewest} images in each set, and there are {there}"
                    )

    def _is_there(self, name):
        """Whether the reference has what a metric needs."""
        needs, stored = METRICS[name].needs, self.reference.stored(*self.wanted[name])
        return self.reference.images is not None or needs in ALONE or (needs == "statistics" and stored is not None)

    def needed(self, *needs: str) -> list[Output]:
        """(network, output) of the wanted metrics that need one of these attributes of a Pair, each once."""
        return list(dict.fromkeys(key for name, key in self.wanted.items() if METRICS[name].needs in needs))

    def open_networks(self, state: "PartialState") -> list[str]:
        """Load the networks. Returns warnings before any work.

        Raises ValueError where their weights are not to be had, or are not those of the stored statistics.
        """
        self.state, (samples, reference) = state, (self.samples, self.reference)
        names = dict.fromkeys(network for network, _ in self.wanted.values())
        self.networks = feature_networks(self.args, names, state)
        widths = {(name, output): self.networks[name].outputs[output] for name, output in self.needed("statistics")}
        for (name, output), width in widths.items():
            stored, digest = reference.stored(name, output), self.networks[name].digest
            if stored is not None and stored.dim != width:
                raise ValueError(
                    f"--reference {reference.path} has statistics of {stored.dim} features, and {name}'s {output} "
                    f"features are {width}"
                )
            if stored is not None and reference.network_sha256 not in (None, digest):
                raise ValueError(
                    f"--reference {reference.path} was made with other weights of {name} "
                    f"({reference.network_sha256[:8]}…) than these ({digest[:8]}…)"
                )
        unused = self.args.reference and not reference.path
        return [
            *samples.notes,
            *(reference.images.notes if reference.images else ()),
            *(["--reference is not used: no metric compares with it"] if unused else ()),
            *notes.of_counts(samples.count, max(widths.values(), default=0), reference, self.wanted),
            *notes.of_record(samples.record or {}),
            *notes.of_images(samples, reference),
            *(line for network in self.networks.values() for line in network.notes),
        ]

    def measure(self) -> list[str]:
        """Measure both sets, in all processes, and compute the metrics on rank 0. Returns warnings of what it found."""
        distances, features = self.needed("statistics"), self.needed("features")
        stored = {key: one for key in distances if (one := self.reference.stored(*key)) is not None}
        lacking = [key for key in distances if key not in stored]
        self.compared = Measured(0)
        if lacking or features:
            self.compared = self._pass(self.reference.images, lacking, features, "reference")
        self.compared.statistics.update(stored)
        self.found = self._pass(self.samples, distances, self.needed("features", *ALONE), "samples")
        if not self.state.is_main_process:
            return []
        threads = torch.get_num_threads()
        torch.set_num_threads(cores_per_process() * int(os.environ.get("LOCAL_WORLD_SIZE", 1)))  # the others wait
        try:
            for network in self.networks:
                self._compute(network)
        finally:
            torch.set_num_threads(threads)
        return notes.of_pixels(self.found, self.reference, self.compared) + notes.of_order(self.values)

    def _pass(self, images, statistics, keep, desc):
        used = {name for name, _ in [*statistics, *keep]}
        networks = [one for name, one in self.networks.items() if name in used]
        return measure(images, networks, self.state, statistics, keep, self.args.batch_size, desc)

    def _compute(self, network):
        """The metrics of one network's outputs."""
        rows, sets = {name: METRICS[name] for name in self.wanted if self.wanted[name][0] == network}, [None, None]
        for place, one in enumerate((self.compared, self.found)):
            if (network, "pool") in one.rows:
                sets[place] = one.rows[network, "pool"].to(self.state.device)
        pair = Pair(features=sets, samples=sets[1], pr_precision=self.args.pr_precision, seed=self.args.global_seed)
        for key in self.needed("statistics"):
            if key[0] == network:
                pair.statistics[key[1]] = self.compared.statistics[key], self.found.statistics[key]
        if any(row.needs == "probabilities" for row in rows.values()):
            pair.probabilities = self.networks[network].probabilities(sets[1])
        for name, row in rows.items():
            found = row.function(pair)
            self.values.update(found if isinstance(found, dict) else {row.key or name: found})

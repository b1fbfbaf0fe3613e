"""Write a reference for evaluate.py and for ADM's evaluator: statistics of all images of a folder, and some images.

    python evaluate.py make-reference /path/to/imagenet/train OUT.npz --image-size 256
    torchrun --nproc_per_node=N evaluate.py make-reference /path/to/imagenet/train OUT.npz --image-size 256

In: an .npz or a folder of images, whose images are cropped as ADM does. Out: OUT.npz with arr_0 (images spread evenly
over the folder, for precision and recall), mu and sigma, and, of Inception, mu_s and sigma_s.
"""

from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dlc.data.npz import write_images
from dlc.machine.cli import number
from dlc.machine.files import check_output
from dlc.machine.processes import create_logger, start_processes, wait_for_all
from evaluation.feature_networks import add_network_flags, check_weights_flags, feature_networks
from evaluation.measuring import measure
from evaluation.notes import PUBLISHED_REFERENCE
from evaluation.reference import STORED
from evaluation.sets import open_images


def add_flags(add: Callable) -> None:
    add("images", metavar="FOLDER", help="read these images: a folder, with classes or without, or an .npz with arr_0")
    add("output", metavar="OUT.npz", help="write this .npz")
    add("--image-size", type=number(int, 1), required=True, help="crop a folder's images to this size, pixels")
    add(
        "--num-images",
        type=number(int, 0),
        default=PUBLISHED_REFERENCE,
        help="store at most this many images as arr_0; 0 stores the statistics alone",
    )
    add_network_flags(add)


def run(args: Namespace) -> None:
    """Measure the images, and write the reference."""
    if not args.output.endswith(".npz"):
        raise ValueError(f"{args.output} does not end in .npz")
    check_output(args.output, "OUT.npz", [args.images], own=("network", "network_sha256", "mu", "sigma"))
    check_weights_flags(args, [args.features])
    images = open_images(args.images, "FOLDER", crop=args.image_size)
    if images.size != (args.image_size, args.image_size):
        raise ValueError(f"{args.images} has images of {images.size[1]} x {images.size[0]} pixels, not --image-size")
    if images.count < 2:
        raise ValueError(f"{args.images} has {images.count} image, and a covariance needs at least 2")
    state = start_processes()
    logger = create_logger(state)
    network = feature_networks(args, [args.features], state)[args.features]
    for note in (*images.notes, *network.notes):
        logger.warning(f"warning: {note}")
    measured = measure(images, [network], state, batch_size=args.batch_size)
    if state.is_main_process:
        rows = np.unique(np.linspace(0, images.count - 1, min(args.num_images, images.count)).round().astype(int))
        arrays = dict(network=network.name, network_sha256=network.digest, count=images.count, sha256=measured.digest)
        for output, (mean, covariance) in STORED.items():
            if output in network.outputs:
                statistics = measured.statistics[network.name, output]
                arrays.update({mean: statistics.mean.numpy(), covariance: statistics.covariance.numpy()})
        write_images(Path(args.output), (len(rows), *images.size, 3), images.chosen(rows.tolist()), arrays)
        logger.info(f"{args.output}: statistics of {images.count:,} images, and {len(rows):,} of them as arr_0")
        if measured.twins:
            logger.warning(f"warning: {len(measured.twins):,} of the images equal an earlier one")
    wait_for_all()
    state.destroy_process_group()

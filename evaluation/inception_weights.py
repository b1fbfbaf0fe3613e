"""The weights of FID's Inception network, read from each of the files that people have.

| file | of |
|---|---|
| weights-inception-2015-12-05-6726825d.pth, pt_inception-2015-12-05-6726825d.pth | torch-fidelity, pytorch-fid |
| classify_image_graph_def.pb | TensorFlow, which ADM's evaluator fetches |
"""

import functools
import re
from pathlib import Path

import torch

from dlc.weights.foreign.safe import check_tensors, differences_from, load_tensors
from dlc.weights.hub import sha256_of
from evaluation.graph_def import read_constants
from evaluation.inception import InceptionV3

URL = "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
NAMES = ("weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth")
GRAPH = "classify_image_graph_def.pb"  # in the directory in which ADM's evaluator was run
SHA256_PREFIX = "6726825d"  # in the files' names, by torch.hub's convention

# TensorFlow's scopes of the convolutions of each kind of block, and the names here
STEM = ("Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "Conv2d_3b_1x1", "Conv2d_4a_3x3")
BLOCKS = ("5b", "5c", "5d", "6a", "6b", "6c", "6d", "6e", "7a", "7b", "7c")  # mixed, mixed_1, …, mixed_10
A = {
    "conv": "branch1x1",
    "tower/conv": "branch5x5_1",
    "tower/conv_1": "branch5x5_2",
    "tower_1/conv": "branch3x3dbl_1",
    "tower_1/conv_1": "branch3x3dbl_2",
    "tower_1/conv_2": "branch3x3dbl_3",
    "tower_2/conv": "branch_pool",
}
B = {
    "conv": "branch3x3",
    "tower/conv": "branch3x3dbl_1",
    "tower/conv_1": "branch3x3dbl_2",
    "tower/conv_2": "branch3x3dbl_3",
}
C = {
    "conv": "branch1x1",
    "tower/conv": "branch7x7_1",
    "tower/conv_1": "branch7x7_2",
    "tower/conv_2": "branch7x7_3",
    "tower_1/conv": "branch7x7dbl_1",
    "tower_1/conv_1": "branch7x7dbl_2",
    "tower_1/conv_2": "branch7x7dbl_3",
    "tower_1/conv_3": "branch7x7dbl_4",
    "tower_1/conv_4": "branch7x7dbl_5",
    "tower_2/conv": "branch_pool",
}
D = {
    "tower/conv": "branch3x3_1",
    "tower/conv_1": "branch3x3_2",
    "tower_1/conv": "branch7x7x3_1",
    "tower_1/conv_1": "branch7x7x3_2",
    "tower_1/conv_2": "branch7x7x3_3",
    "tower_1/conv_3": "branch7x7x3_4",
}
E = {
    "conv": "branch1x1",
    "tower/conv": "branch3x3_1",
    "tower/mixed/conv": "branch3x3_2a",
    "tower/mixed/conv_1": "branch3x3_2b",
    "tower_1/conv": "branch3x3dbl_1",
    "tower_1/conv_1": "branch3x3dbl_2",
    "tower_1/mixed/conv": "branch3x3dbl_3a",
    "tower_1/mixed/conv_1": "branch3x3dbl_3b",
    "tower_2/conv": "branch_pool",
}
LAYOUTS = dict(zip(BLOCKS, (A, A, A, B, C, C, C, C, D, E, E)))
BATCH_NORM = dict(beta="bias", gamma="weight", moving_mean="running_mean", moving_variance="running_var")


@functools.cache
def tensorflow_names() -> dict[str, str]:
    """The name of each of the network's 472 tensors: {TensorFlow's: ours}."""
    scopes = {f"conv{f'_{i}' if i else ''}": name for i, name in enumerate(STEM)}
    for i, block in enumerate(BLOCKS):
        mixed = f"mixed{f'_{i}' if i else ''}"
        scopes.update({f"{mixed}/{scope}": f"Mixed_{block}.{name}" for scope, name in LAYOUTS[block].items()})
    names = {"softmax/weights": "fc.weight", "softmax/biases": "fc.bias"}
    for scope, name in scopes.items():
        names[f"{scope}/conv2d_params"] = f"{name}.conv.weight"
        names.update({f"{scope}/batchnorm/{theirs}": f"{name}.bn.{ours}" for theirs, ours in BATCH_NORM.items()})
    return names


def from_graph(path) -> dict[str, torch.Tensor]:
    """The named tensors in a frozen TensorFlow graph. Kernels there are (height, width, in, out)."""
    constants, tensors = read_constants(path), {}
    for theirs, ours in tensorflow_names().items():
        if theirs in constants:
            tensor = torch.from_numpy(constants[theirs].copy())
            tensors[ours] = tensor.permute(3, 2, 0, 1) if tensor.ndim == 4 else tensor.T if tensor.ndim == 2 else tensor
    return tensors


def read_weights(path) -> dict[str, torch.Tensor]:
    """The named tensors in a .pb, or in a .pth of any torch, or a .safetensors. Raises ValueError naming the file."""
    path = Path(path)
    if path.suffix == ".pb":
        return from_graph(path)
    return {name: value for name, value in load_tensors(path).items() if not str(name).endswith(".num_batches_tracked")}


def load_inception(path) -> InceptionV3:
    """The network with the weights of a file, float32, on the CPU. Raises ValueError, naming the file."""
    weights = check_tensors(read_weights(path), path)
    with torch.device("meta"):
        network = InceptionV3()
    wanted = {key: value for key, value in network.state_dict().items() if not key.endswith(".num_batches_tracked")}
    different = differences_from(wanted, weights)
    if different:
        raise ValueError(f"{path} is not of the 2015 Inception network of FID: it {different}")
    counts = {key: torch.tensor(0) for key in network.state_dict().keys() - wanted.keys()}
    network.load_state_dict(
        {**{key: value.float().contiguous() for key, value in weights.items()}, **counts}, assign=True
    )
    return network.eval().requires_grad_(False)


def digest_fault(path) -> str | None:
    """Why a file's SHA-256 shows that its numbers are not the published ones, in words, or None.

    That of a graph is not known: its tensors are those of the published file, but the file is another.
    """
    path = Path(path)
    if path.suffix == ".pb":
        return None
    found = sha256_of(path)
    if found.startswith(SHA256_PREFIX):
        return None
    if re.search(rf"-{SHA256_PREFIX}\.pth$", path.name):
        raise ValueError(
            f"{path} has the SHA-256 {found[:8]}…, wanted {SHA256_PREFIX}…, as its name says: it is damaged or another "
            "file; fetch it again"
        )
    return f"the Inception weights in {path} are not the published file (SHA-256 {found[:8]}…, not {SHA256_PREFIX}…)"

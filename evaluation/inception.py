"""The Inception network of FID: the graph of 5 December 2015 that TensorFlow published, with its resize.

    network = load_inception(path)
    pool, spatial = network(images)                                # (N, 2048), (N, 2023)
    probs = network.probabilities(pool)                            # (N, 1008)

Architecture: Szegedy et al. 2016, arXiv 1512.00567. The 2015 graph differs from the network that torchvision has: it
has 1008 classes, resizes in its own way, its average pools leave the padding out, and the last block pools by maximum.
Names are those of the published PyTorch weights, which are torchvision's.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from dlc.weights.foreign.safe import check_tensors, differences_from, load_tensors

SIDE = 299  # pixels that the network sees
# of mixed_6/conv, the first branch of Mixed_6d, as sFID takes them (Nash et al. 2021, arXiv 2103.03841)
SPATIAL_CHANNELS = 7
PROBS_ROWS = 512  # rows of one softmax, as in ADM
UNREAD = ".num_batches_tracked"  # of batch norms; some files have it
Kernel = int | tuple[int, int]


def resize_tf1(images: torch.Tensor, side: int = SIDE) -> torch.Tensor:
    """Images (N, 3, H, W) float32 to (N, 3, side, side) by TensorFlow 1's bilinear resize.

    Output pixel i lies at i * H / side of the input: corners are not aligned, pixels have no half-pixel centres, and
    nothing is smoothed when sizes shrink. Equal to TensorFlow's to the bit on a CPU.
    """

    def places(size):
        position = torch.arange(side, device=images.device).float() * torch.tensor(size / side).float().item()
        low = position.floor().long()
        return low, (low + 1).clamp(max=size - 1), position - low

    top, bottom, down = places(images.shape[2])
    left, right, across = places(images.shape[3])
    above, below = images[:, :, top], images[:, :, bottom]  # (N, 3, side, W)
    above, below = (rows[..., left] + (rows[..., right] - rows[..., left]) * across for rows in (above, below))
    return above + (below - above) * down[:, None]


#################################################################################
#                                    Blocks                                     #
#################################################################################


class BasicConv2d(nn.Module):
    """Convolution without bias, batch norm, ReLU."""

    def __init__(self, channels: int, out_channels: int, kernel_size: Kernel, stride: int = 1, padding: Kernel = 0):
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels, kernel_size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=1e-3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.bn(self.conv(x)), inplace=True)


average = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
maximum = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)
maximum_halved = partial(F.max_pool2d, kernel_size=3, stride=2)
ROW, COLUMN, SHORT_ROW, SHORT_COLUMN = (1, 7), (7, 1), (1, 3), (3, 1)  # kernels along one axis
HALVED = None  # stands for a 3 x 3 kernel with stride 2 and no padding


class Mixed(nn.Module):
    """Branches of convolutions from one input, whose outputs are concatenated; the last branch pools.

    Args:
        branches: each a list of (name, channels, kernel). Where two begin with the same names, these are shared.
        pool: what the last branch begins with. pool_channels: of its convolution `branch_pool`; 0: it has none.
    """

    def __init__(self, channels: int, *branches: list, pool: Callable = average, pool_channels: int = 0):
        super().__init__()
        self.pool, self.branches = pool, [[name for name, _, _ in branch] for branch in branches]
        for branch in branches:
            width = channels
            for name, out, kernel in branch:
                size = kernel if isinstance(kernel, tuple) else (kernel or 3,) * 2
                shape = (size, 2) if kernel is HALVED else (size, 1, (size[0] // 2, size[1] // 2))
                self.add_module(name, BasicConv2d(width, out, *shape))
                width = out
        self.branch_pool = BasicConv2d(channels, pool_channels, 1) if pool_channels else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        outputs = {}
        for branch in self.branches:
            y = x
            for name in branch:
                y = outputs[name] = outputs[name] if name in outputs else getattr(self, name)(y)
        last = [outputs[branch[-1]] for branch in self.branches]
        return torch.cat([*last, self.branch_pool(self.pool(x))], dim=1)


def mixed_a(channels: int, pool_channels: int) -> Mixed:
    """35 x 35 cells."""
    return Mixed(
        channels,
        [("branch1x1", 64, 1)],
        [("branch5x5_1", 48, 1), ("branch5x5_2", 64, 5)],
        [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, 3)],
        pool_channels=pool_channels,
    )


def mixed_b(channels: int) -> Mixed:
    """35 x 35 to 17 x 17 cells."""
    double = [("branch3x3dbl_1", 64, 1), ("branch3x3dbl_2", 96, 3), ("branch3x3dbl_3", 96, HALVED)]
    return Mixed(channels, [("branch3x3", 384, HALVED)], double, pool=maximum_halved)


def mixed_c(channels: int, width: int) -> Mixed:
    """17 x 17 cells; 7 x 7 kernels as pairs of a row and a column."""
    double = [("branch7x7dbl_1", width, 1), ("branch7x7dbl_2", width, COLUMN), ("branch7x7dbl_3", width, ROW)]
    return Mixed(
        channels,
        [("branch1x1", 192, 1)],
        [("branch7x7_1", width, 1), ("branch7x7_2", width, ROW), ("branch7x7_3", 192, COLUMN)],
        [*double, ("branch7x7dbl_4", width, COLUMN), ("branch7x7dbl_5", 192, ROW)],
        pool_channels=192,
    )


def mixed_d(channels: int) -> Mixed:
    """17 x 17 to 8 x 8 cells."""
    seven = [("branch7x7x3_1", 192, 1), ("branch7x7x3_2", 192, ROW), ("branch7x7x3_3", 192, COLUMN)]
    return Mixed(
        channels,
        [("branch3x3_1", 192, 1), ("branch3x3_2", 320, HALVED)],
        [*seven, ("branch7x7x3_4", 192, HALVED)],
        pool=maximum_halved,
    )


def mixed_e(channels: int, pool: Callable) -> Mixed:
    """8 x 8 cells; forks of a row and a column."""
    double = [("branch3x3dbl_1", 448, 1), ("branch3x3dbl_2", 384, 3)]
    return Mixed(
        channels,
        [("branch1x1", 320, 1)],
        [("branch3x3_1", 384, 1), ("branch3x3_2a", 384, SHORT_ROW)],
        [("branch3x3_1", 384, 1), ("branch3x3_2b", 384, SHORT_COLUMN)],
        [*double, ("branch3x3dbl_3a", 384, SHORT_ROW)],
        [*double, ("branch3x3dbl_3b", 384, SHORT_COLUMN)],
        pool=pool,
        pool_channels=192,
    )


#################################################################################
#                                  The network                                  #
#################################################################################


class InceptionV3(nn.Module):
    """Images to the three outputs of the 2015 graph that ADM reads, in one pass. In eval mode, without gradients."""

    def __init__(self):
        super().__init__()
        self.Conv2d_1a_3x3 = BasicConv2d(3, 32, 3, stride=2)
        self.Conv2d_2a_3x3 = BasicConv2d(32, 32, 3)
        self.Conv2d_2b_3x3 = BasicConv2d(32, 64, 3, padding=1)
        self.Conv2d_3b_1x1 = BasicConv2d(64, 80, 1)
        self.Conv2d_4a_3x3 = BasicConv2d(80, 192, 3)
        self.Mixed_5b = mixed_a(192, 32)
        self.Mixed_5c = mixed_a(256, 64)
        self.Mixed_5d = mixed_a(288, 64)
        self.Mixed_6a = mixed_b(288)
        self.Mixed_6b = mixed_c(768, 128)
        self.Mixed_6c = mixed_c(768, 160)
        self.Mixed_6d = mixed_c(768, 160)
        self.Mixed_6e = mixed_c(768, 192)
        self.Mixed_7a = mixed_d(768)
        self.Mixed_7b = mixed_e(1280, average)
        self.Mixed_7c = mixed_e(2048, maximum)
        self.fc = nn.Linear(2048, 1008)
        self.eval().requires_grad_(False)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (N, 3, H, W) of values 0 to 255 to `pool` (N, 2048) and `spatial` (N, 2023), both float32.

        pool is TensorFlow's pool_3. spatial is the first 7 channels of mixed_6/conv, flattened with the channel last.
        """
        x = (resize_tf1(images.to(self.fc.weight.dtype)) - 128) / 128  # (N, 3, 299, 299)
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x)))  # (N, 64, 147, 147)
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(x))  # (N, 192, 71, 71)
        x = F.max_pool2d(x, 3, stride=2)
        x = self.Mixed_5d(self.Mixed_5c(self.Mixed_5b(x)))  # (N, 288, 35, 35)
        x = self.Mixed_6d(self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x))))  # (N, 768, 17, 17)
        spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        x = self.Mixed_6e(x)
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # (N, 2048, 8, 8)
        return x.mean(dim=(2, 3)).float(), spatial.float()

    def probabilities(self, pool: torch.Tensor) -> torch.Tensor:
        """The softmax (N, 1008) of pool (N, 2048) times the last layer's weights: without its bias, as ADM has it."""
        weight = self.fc.weight.float()
        return torch.cat([torch.softmax(rows.to(weight) @ weight.T, dim=1) for rows in pool.split(PROBS_ROWS)])


def load_inception(path: str | Path) -> InceptionV3:
    """The network with the weights of a .pth of any torch or a .safetensors, float32, on the CPU.

    Raises ValueError, naming the file.
    """
    weights = {key: value for key, value in load_tensors(path).items() if not str(key).endswith(UNREAD)}
    check_tensors(weights, path)
    with torch.device("meta"):
        network = InceptionV3()
    names = network.state_dict()
    different = differences_from({key: value for key, value in names.items() if not key.endswith(UNREAD)}, weights)
    if different:
        raise ValueError(f"{path} does not hold the 2015 Inception network of FID: it {different}")
    values = {key: torch.tensor(0) if key.endswith(UNREAD) else weights[key].float().contiguous() for key in names}
    network.load_state_dict(values, assign=True)
    return network.eval().requires_grad_(False)

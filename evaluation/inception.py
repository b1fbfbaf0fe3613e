"""The Inception network of FID: the graph of 5 December 2015 that TensorFlow published, with its resize.

    network = load_inception(path)
    pool, spatial = network(images)                                # (N, 2048), (N, 2023)
    probs = network.probabilities(pool)                            # (N, 1008)

Architecture: Szegedy et al. 2016, arXiv 1512.00567. The 2015 graph differs from the network that torchvision has: it
has 1008 classes, resizes in its own way, its average pools leave the padding out, and the last block pools by maximum.
Names are those of the published PyTorch weights, which are torchvision's.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from dlc.weights.foreign.safe import check_tensors, differences_from, load_tensors

SIDE = 299  # pixels that the network sees
SPATIAL_CHANNELS = 7  # of the output of mixed_6/conv, as sFID takes them (Nash et al. 2021, arXiv 2103.03841)
PROBS_ROWS = 512  # rows of one softmax, as in ADM


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

    def __init__(self, channels, out_channels, kernel_size, stride=1, padding=0):
        super().__init__()
        self.conv = nn.Conv2d(channels, out_channels, kernel_size, stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(out_channels, eps=1e-3)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


def average(x):
    return F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)


def maximum(x):
    return F.max_pool2d(x, 3, stride=1, padding=1)


class InceptionA(nn.Module):
    """35 x 35 cells: 1x1, 5x5, two 3x3, pool."""

    def __init__(self, channels, pool_channels):
        super().__init__()
        self.branch1x1 = BasicConv2d(channels, 64, 1)
        self.branch5x5_1 = BasicConv2d(channels, 48, 1)
        self.branch5x5_2 = BasicConv2d(48, 64, 5, padding=2)
        self.branch3x3dbl_1 = BasicConv2d(channels, 64, 1)
        self.branch3x3dbl_2 = BasicConv2d(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = BasicConv2d(96, 96, 3, padding=1)
        self.branch_pool = BasicConv2d(channels, pool_channels, 1)

    def forward(self, x):
        five = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch1x1(x), five, double, self.branch_pool(average(x))], dim=1)


class InceptionB(nn.Module):
    """35 x 35 to 17 x 17 cells."""

    def __init__(self, channels):
        super().__init__()
        self.branch3x3 = BasicConv2d(channels, 384, 3, stride=2)
        self.branch3x3dbl_1 = BasicConv2d(channels, 64, 1)
        self.branch3x3dbl_2 = BasicConv2d(64, 96, 3, padding=1)
        self.branch3x3dbl_3 = BasicConv2d(96, 96, 3, stride=2)

    def forward(self, x):
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return torch.cat([self.branch3x3(x), double, F.max_pool2d(x, 3, stride=2)], dim=1)


class InceptionC(nn.Module):
    """17 x 17 cells: 1x1, 7x7 in two steps, 7x7 in four steps, pool."""

    def __init__(self, channels, width):
        super().__init__()
        row, column = dict(kernel_size=(1, 7), padding=(0, 3)), dict(kernel_size=(7, 1), padding=(3, 0))
        self.branch1x1 = BasicConv2d(channels, 192, 1)
        self.branch7x7_1 = BasicConv2d(channels, width, 1)
        self.branch7x7_2 = BasicConv2d(width, width, **row)
        self.branch7x7_3 = BasicConv2d(width, 192, **column)
        self.branch7x7dbl_1 = BasicConv2d(channels, width, 1)
        self.branch7x7dbl_2 = BasicConv2d(width, width, **column)
        self.branch7x7dbl_3 = BasicConv2d(width, width, **row)
        self.branch7x7dbl_4 = BasicConv2d(width, width, **column)
        self.branch7x7dbl_5 = BasicConv2d(width, 192, **row)
        self.branch_pool = BasicConv2d(channels, 192, 1)

    def forward(self, x):
        return self.after(self.branch1x1(x), x)

    def after(self, one, x):
        """The block's output, given that of its 1x1 branch."""
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return torch.cat([one, seven, double, self.branch_pool(average(x))], dim=1)


class InceptionD(nn.Module):
    """17 x 17 to 8 x 8 cells."""

    def __init__(self, channels):
        super().__init__()
        self.branch3x3_1 = BasicConv2d(channels, 192, 1)
        self.branch3x3_2 = BasicConv2d(192, 320, 3, stride=2)
        self.branch7x7x3_1 = BasicConv2d(channels, 192, 1)
        self.branch7x7x3_2 = BasicConv2d(192, 192, (1, 7), padding=(0, 3))
        self.branch7x7x3_3 = BasicConv2d(192, 192, (7, 1), padding=(3, 0))
        self.branch7x7x3_4 = BasicConv2d(192, 192, 3, stride=2)

    def forward(self, x):
        three = self.branch3x3_2(self.branch3x3_1(x))
        seven = self.branch7x7x3_4(self.branch7x7x3_3(self.branch7x7x3_2(self.branch7x7x3_1(x))))
        return torch.cat([three, seven, F.max_pool2d(x, 3, stride=2)], dim=1)


class InceptionE(nn.Module):
    """8 x 8 cells: 1x1, a fork of 1x3 and 3x1, the same after a 3x3, pool (`average` or `maximum`)."""

    def __init__(self, channels, pool):
        super().__init__()
        row, column = dict(kernel_size=(1, 3), padding=(0, 1)), dict(kernel_size=(3, 1), padding=(1, 0))
        self.pool = pool
        self.branch1x1 = BasicConv2d(channels, 320, 1)
        self.branch3x3_1 = BasicConv2d(channels, 384, 1)
        self.branch3x3_2a = BasicConv2d(384, 384, **row)
        self.branch3x3_2b = BasicConv2d(384, 384, **column)
        self.branch3x3dbl_1 = BasicConv2d(channels, 448, 1)
        self.branch3x3dbl_2 = BasicConv2d(448, 384, 3, padding=1)
        self.branch3x3dbl_3a = BasicConv2d(384, 384, **row)
        self.branch3x3dbl_3b = BasicConv2d(384, 384, **column)
        self.branch_pool = BasicConv2d(channels, 192, 1)

    def forward(self, x):
        three = self.branch3x3_1(x)
        double = self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        return torch.cat(
            [
                self.branch1x1(x),
                self.branch3x3_2a(three),
                self.branch3x3_2b(three),
                self.branch3x3dbl_3a(double),
                self.branch3x3dbl_3b(double),
                self.branch_pool(self.pool(x)),
            ],
            dim=1,
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
        self.Mixed_5b = InceptionA(192, 32)
        self.Mixed_5c = InceptionA(256, 64)
        self.Mixed_5d = InceptionA(288, 64)
        self.Mixed_6a = InceptionB(288)
        self.Mixed_6b = InceptionC(768, 128)
        self.Mixed_6c = InceptionC(768, 160)
        self.Mixed_6d = InceptionC(768, 160)
        self.Mixed_6e = InceptionC(768, 192)
        self.Mixed_7a = InceptionD(768)
        self.Mixed_7b = InceptionE(1280, average)
        self.Mixed_7c = InceptionE(2048, maximum)
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
        x = self.Mixed_6c(self.Mixed_6b(self.Mixed_6a(x)))  # (N, 768, 17, 17)
        one = self.Mixed_6d.branch1x1(x)  # (N, 192, 17, 17)
        x = self.Mixed_6e(self.Mixed_6d.after(one, x))
        x = self.Mixed_7c(self.Mixed_7b(self.Mixed_7a(x)))  # (N, 2048, 8, 8)
        spatial = one[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        return x.mean(dim=(2, 3)).float(), spatial.float()

    def probabilities(self, pool: torch.Tensor) -> torch.Tensor:
        """The softmax (N, 1008) of pool (N, 2048) times the last layer's weights: without its bias, as ADM has it."""
        weight = self.fc.weight.float()
        return torch.cat([torch.softmax(rows.to(weight) @ weight.T, dim=1) for rows in pool.split(PROBS_ROWS)])


def load_inception(path) -> InceptionV3:
    """The network with the weights of a .pth of any torch or a .safetensors, float32, on the CPU.

    Raises ValueError, naming the file.
    """
    weights = {key: value for key, value in load_tensors(path).items() if not str(key).endswith(".num_batches_tracked")}
    check_tensors(weights, path)
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

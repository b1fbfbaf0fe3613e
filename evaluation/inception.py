"""The Inception network of FID: the graph of 5 December 2015 that TensorFlow published, with its resize.

    network = load_inception(path)
    pool, spatial = network(images)                                # (N, 2048), (N, 2023)
    probs = network.probabilities(pool)                            # (N, 1008)

Architecture: Szegedy et al. 2016, arXiv 1512.00567. The 2015 graph differs from the network that torchvision has: it
has 1008 classes, resizes in its own way, its average pools leave the padding out, and the last block pools by maximum.
Names are those of the published PyTorch weights, which are torchvision's.
"""

from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torchvision.models import inception as blocks

from dlc.weights.foreign.safe import check_tensors, differences_from, load_tensors

SIDE = 299  # pixels that the network sees
# of mixed_6/conv, the first branch of Mixed_6d, as sFID takes them (Nash et al. 2021, arXiv 2103.03841)
SPATIAL_CHANNELS = 7
PROBS_ROWS = 512  # rows of one softmax, as in ADM
UNREAD = ".num_batches_tracked"  # of batch norms; some files have it


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
#              Blocks of torchvision that pool as the graph does                #
#################################################################################

average = partial(F.avg_pool2d, kernel_size=3, stride=1, padding=1, count_include_pad=False)
maximum = partial(F.max_pool2d, kernel_size=3, stride=1, padding=1)


class BlockA(blocks.InceptionA):
    def _forward(self, x):
        five = self.branch5x5_2(self.branch5x5_1(x))
        double = self.branch3x3dbl_3(self.branch3x3dbl_2(self.branch3x3dbl_1(x)))
        return [self.branch1x1(x), five, double, self.branch_pool(average(x))]


class BlockC(blocks.InceptionC):
    def _forward(self, x):
        seven = self.branch7x7_3(self.branch7x7_2(self.branch7x7_1(x)))
        double = self.branch7x7dbl_3(self.branch7x7dbl_2(self.branch7x7dbl_1(x)))
        double = self.branch7x7dbl_5(self.branch7x7dbl_4(double))
        return [self.branch1x1(x), seven, double, self.branch_pool(average(x))]


class BlockE(blocks.InceptionE):
    pool = staticmethod(average)

    def _forward(self, x):
        three, double = self.branch3x3_1(x), self.branch3x3dbl_2(self.branch3x3dbl_1(x))
        threes = [self.branch3x3_2a(three), self.branch3x3_2b(three)]
        doubles = [self.branch3x3dbl_3a(double), self.branch3x3dbl_3b(double)]
        return [self.branch1x1(x), *threes, *doubles, self.branch_pool(self.pool(x))]


#################################################################################
#                                  The network                                  #
#################################################################################


class InceptionV3(blocks.Inception3):
    """Images to the three outputs of the 2015 graph that ADM reads, in one pass. In eval mode, without gradients."""

    def __init__(self):
        kinds = [blocks.BasicConv2d, BlockA, blocks.InceptionB, BlockC, blocks.InceptionD, BlockE, None]
        super().__init__(num_classes=1008, aux_logits=False, inception_blocks=kinds, init_weights=False)
        self.Mixed_7c.pool = maximum
        self.eval().requires_grad_(False)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images (N, 3, H, W) of values 0 to 255 to `pool` (N, 2048) and `spatial` (N, 2023), both float32.

        pool is TensorFlow's pool_3; spatial is the first 7 channels of mixed_6/conv, flattened with the channel last.
        """
        x = (resize_tf1(images.to(self.fc.weight.dtype)) - 128) / 128  # (N, 3, 299, 299)
        for name, layer in self.named_children():  # in the order in which they act
            if name == "avgpool":
                break
            x = layer(x)
            if name == "Mixed_6d":  # (N, 768, 17, 17)
                spatial = x[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)
        return x.mean(dim=(2, 3)).float(), spatial.float()  # x: (N, 2048, 8, 8)

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

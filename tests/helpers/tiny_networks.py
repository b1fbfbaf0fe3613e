"""evaluate.py with a small network in Inception's place: the real script, its processes and files, in little time."""

import torch

from dlc.evaluation import networks


class TinyInception:
    """A random layer on the colours of 4 x 4 cells: 12 features, 6 spatial ones, 5 classes. Any file is its weights."""

    name, flag, files, url, sha256_prefix = "inception", "--inception", ("tiny.bin",), "http://127.0.0.1:9/tiny.bin", ""
    outputs = dict(pool=12, spatial=6)

    def __init__(self, path, device):
        self.path, self.device, self.notes = path, device, []
        self.digest = f"{sum(open(path, 'rb').read()):064d}"
        torch.manual_seed(0)
        self.module = torch.nn.Linear(48, 18)

    def __call__(self, images):
        images = images.to(self.device).permute(0, 3, 1, 2).to(self.module.weight.dtype) / 255
        with torch.no_grad():
            found = torch.sigmoid(self.module(torch.nn.functional.adaptive_avg_pool2d(images, 4).flatten(1))).float()
        return dict(pool=found[:, :12], spatial=found[:, 12:])

    def probabilities(self, pool):
        return torch.softmax(30 * pool[:, :5], dim=1)


networks.NETWORKS["inception"] = TinyInception


def main():
    import evaluate

    evaluate.main()

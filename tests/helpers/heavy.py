"""The packages that the scripts import where they use them, imported: for the server that forked.Run forks from."""

import importlib

for name in (
    "accelerate.utils",
    "diffusers.models.autoencoders.autoencoder_kl",
    "matplotlib.backends.backend_agg",
    "timm.models.vision_transformer",
    "torch.distributed.fsdp",
):
    importlib.import_module(name)

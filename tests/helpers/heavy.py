"""The packages that the scripts import where they use them, imported: for the server that forked.Run forks from."""

import accelerate.utils  # noqa: F401
import diffusers.models.autoencoders.autoencoder_kl  # noqa: F401
import timm.models.vision_transformer  # noqa: F401
import torch.distributed.fsdp  # noqa: F401

"""Networks whose last bits depend on the batch's size and on a row's place in it, as they do on some machines.

With `install` every VAE, SEM encoder, DiT and prior of a process rounds so; the tests run with it, in their own process
and, by sitecustomize.py beside this, in all that they start. What then equals to the bit does so on any machine.
"""

import importlib.abc
import importlib.util
import sys

FLOAT32 = 2e-6  # relative, seen between a batch of one and of two on an AMD EPYC of family 26


def rounded(rows, size=FLOAT32):
    """Rows (n, ...) times 1 + noise, which is a function of n, the row's place and the element's place in the row."""
    import torch  # not above: most processes do without

    if not len(rows):
        return rows
    n, device = len(rows), rows.device
    element = torch.arange(rows.shape[1:].numel(), device=device).view(1, *rows.shape[1:])
    place = torch.arange(n, device=device).view(-1, *[1] * (rows.ndim - 1))
    noise = (7919 * n + 104729 * place + 31 * element) % 1009 / 504 - 1  # -1 to 1
    factor = 1 + noise * max(size, torch.finfo(rows.dtype).eps)  # 16 bits: some last bits
    return (rows * factor).to(rows.dtype)


def change_vae(module):
    encode, decode = module.AutoencoderKL.encode, module.AutoencoderKL.decode

    def rounded_encode(self, *args, **kwargs):
        output = encode(self, *args, **kwargs)
        output.latent_dist = type(output.latent_dist)(rounded(output.latent_dist.parameters))
        return output

    def rounded_decode(self, *args, **kwargs):
        output = decode(self, *args, **kwargs)
        output.sample = rounded(output.sample)
        return output

    module.AutoencoderKL.encode, module.AutoencoderKL.decode = rounded_encode, rounded_decode


def change_encoder(module):
    logits = module.SEMEncoder.logits
    module.SEMEncoder.logits = lambda self, images: rounded(logits(self, images))


def change_models(module):
    denoise = module.DiT.denoise
    module.DiT.denoise = lambda self, *inputs: rounded(denoise(self, *inputs))


def change_prior(module):
    forward = module.DLCPrior.forward
    # less: log scores are compared with the published network's to 1e-5
    module.DLCPrior.forward = lambda self, *args, **kwargs: rounded(forward(self, *args, **kwargs), FLOAT32 / 4)


CHANGES = {
    "diffusers.models.autoencoders.autoencoder_kl": change_vae,
    "dlc.nets.encoder": change_encoder,
    "models": change_models,
    "prior": change_prior,
}


class Importer(importlib.abc.MetaPathFinder):
    """Changes each of those modules once it is imported."""

    def find_spec(self, name, path, target=None):
        if name not in CHANGES:
            return None
        change = CHANGES.pop(name)  # and leaves the search for it to the finders behind
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_change(module):
            execute(module)
            change(module)

        spec.loader.exec_module = execute_and_change
        return spec


def install():
    sys.meta_path.insert(0, Importer())

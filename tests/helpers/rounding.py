"""Networks whose last bits depend on the batch's size and on a row's place in it, as they do on some machines.

The fixture `rounded` of conftest.py changes those of the test's process and of all that forked.Run starts: what then
equals to the bit does so on any machine.
"""

import importlib

import torch

FLOAT32 = 2e-6  # relative, seen between a batch of one and of two on an AMD EPYC of family 26


def rounded(rows, size=FLOAT32):
    """Rows (n, ...) times 1 + noise, which is a function of n, the row's place and the element's place in the row."""
    if not len(rows):
        return rows
    n, device = len(rows), rows.device
    element = torch.arange(rows.shape[1:].numel(), device=device).view(1, *rows.shape[1:])
    place = torch.arange(n, device=device).view(-1, *[1] * (rows.ndim - 1))
    noise = (7919 * n + 104729 * place + 31 * element) % 1009 / 504 - 1  # -1 to 1
    factor = 1 + noise * max(size, torch.finfo(rows.dtype).eps)  # 16 bits: some last bits
    return (rows * factor).to(rows.dtype)


def rounded_vae(name):
    def change(method):
        def call(self, *args, **kwargs):
            output = method(self, *args, **kwargs)
            if name == "encode":
                output.latent_dist = type(output.latent_dist)(rounded(output.latent_dist.parameters))
            else:
                output.sample = rounded(output.sample)
            return output

        return call

    return change


def rounded_rows(method, size=FLOAT32):
    return lambda self, *args, **kwargs: rounded(method(self, *args, **kwargs), size)


def change_networks(set_attribute=setattr):
    """Change VAEs, SEM encoders, DiTs and priors. set_attribute: monkeypatch's, to change them for a test."""
    for module, network, method, change in (
        ("diffusers.models.autoencoders.autoencoder_kl", "AutoencoderKL", "encode", rounded_vae("encode")),
        ("diffusers.models.autoencoders.autoencoder_kl", "AutoencoderKL", "decode", rounded_vae("decode")),
        ("dlc.nets.encoder", "SEMEncoder", "logits", rounded_rows),
        ("models", "DiT", "denoise", rounded_rows),
        ("prior", "DLCPrior", "forward", rounded_rows),
    ):
        network = getattr(importlib.import_module(module), network)
        set_attribute(network, method, change(getattr(network, method)))

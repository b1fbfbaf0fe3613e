"""train_diffusion.py that compiles nothing, and ends by saying which blocks were to be, and what else flags turn on."""

import torch

import train_diffusion
from models import DiT, DiTBlock


def main():
    compiled, checkpointing = [], []
    DiTBlock.compile = lambda self, **keywords: compiled.append(self)
    set_grad_checkpointing = DiT.set_grad_checkpointing

    def noted(self, enable=True):
        checkpointing.append(enable)
        set_grad_checkpointing(self, enable)

    DiT.set_grad_checkpointing = noted
    train_diffusion.main()
    print(
        f"compiled: {len(compiled)} blocks; checkpointing: {any(checkpointing)}; TF32: "
        f"{torch.backends.cuda.matmul.allow_tf32}, {torch.backends.cudnn.allow_tf32}"
    )

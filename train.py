"""The class-conditional door to train_diffusion.py: the same program, with DiT-XL/2 as its default model."""

from train_diffusion import main

if __name__ == "__main__":
    main(model="DiT-XL/2")

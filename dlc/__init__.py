"""The plumbing between the scripts: encoder, features on disk, VAE, checkpoints, sampling engine, runtime."""

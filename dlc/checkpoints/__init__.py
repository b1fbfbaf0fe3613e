"""Weights and run state in and out."""

from dlc.checkpoints.weights import load_model

__all__ = ["load_model"]

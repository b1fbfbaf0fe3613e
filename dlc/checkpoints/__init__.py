"""Weights and run state in and out."""

"""Metrics of sets of images: arithmetic, feature networks, inputs, references, and the command that joins them."""

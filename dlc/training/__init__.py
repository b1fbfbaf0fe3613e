"""Training: the run, its batches, images in the place of features, and the record."""

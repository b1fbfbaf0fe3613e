"""Sampling: the engine, the conditions, decoding, the files of a set of samples, and the command of both scripts."""

"""Demonstrations on two CPU cores, without a download: scikit-learn's handwritten digits, and emoji in colour."""

"""A demonstration on scikit-learn's handwritten digits that needs two CPU cores and no download."""

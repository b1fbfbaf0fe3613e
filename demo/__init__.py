"""A demonstration on scikit-learn's handwritten digits: two CPU cores, no download."""

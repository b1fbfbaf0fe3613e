"""Read back what `image_grid` lays out."""

import numpy as np
from PIL import Image

from dlc.data.images import GAP, LINE


def grid_cells(path, size, columns, captions=False):
    """The places (rows, columns, size, size, 3) of a grid; there is nothing but them, gaps, captions and row labels."""
    grid = np.array(Image.open(path))
    down, across = size + GAP + LINE * captions, size + GAP
    rows, rest = divmod(grid.shape[0] - GAP, down)
    left = grid.shape[1] - columns * across
    assert rest == 0 and left >= GAP
    cells = [[grid[GAP + i * down :, left + j * across :][:size, :size] for j in range(columns)] for i in range(rows)]
    return np.array(cells)

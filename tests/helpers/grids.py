"""Read back what `image_grid` lays out."""

import numpy as np
from PIL import Image

from dlc.data.images import GAP, LEAST_SHOWN, LINE


def grid_cells(path, size, columns, captions=0):
    """The places (rows, columns, size, size, 3) of a grid; there is nothing but them, gaps, captions and row labels.

    captions: lines under each row, or a list of them.
    """
    grid, factor = np.array(Image.open(path)), -(-LEAST_SHOWN // size)
    side, tops = factor * size, [GAP]
    while tops[-1] < grid.shape[0]:
        lines = captions[len(tops) - 1] if isinstance(captions, list) else captions
        tops.append(tops[-1] + side + GAP + LINE * lines)
    left = grid.shape[1] - columns * (side + GAP)
    assert tops[-1] == grid.shape[0] and left >= GAP
    cells = [
        [grid[top:, left + j * (side + GAP) :][:side:factor, :side:factor] for j in range(columns)] for top in tops[:-1]
    ]
    return np.array(cells)

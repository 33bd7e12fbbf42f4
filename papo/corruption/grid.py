"""A regular pattern of black squares."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from papo.corruption.patches import PatchConfig, blacken_patches, patch_grid
from verl.data.views import image_view


@dataclass
class GridConfig(PatchConfig):
    """Black squares spread as evenly as `prob` allows: a checkerboard at 0.5. Only where it begins is random."""

    kind: str = "grid"


def bayer(steps: int) -> np.ndarray:
    """The ordered-dither matrix [2^steps, 2^steps], 0..1: whatever share lies below a threshold lies evenly spread."""
    matrix = np.zeros((1, 1))
    for _ in range(steps):
        matrix = np.block([[4 * matrix, 4 * matrix + 2], [4 * matrix + 3, 4 * matrix + 1]])
    return (matrix + 0.5) / matrix.size


@image_view("grid", GridConfig)
def grid(image: Image.Image, rng: np.random.Generator, config: GridConfig) -> Image.Image:
    """The RGB `image` with a regular pattern of squares black; their share is `prob` to within 1/64 on large grids."""
    thresholds = bayer(3)
    top, left = rng.integers(8, size=2)
    rows, columns = patch_grid(image, config.patch_size)
    scores = thresholds[(np.arange(rows)[:, None] + top) % 8, (np.arange(columns) + left) % 8]
    return blacken_patches(image, scores, config)

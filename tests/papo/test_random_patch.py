"""Random patch blackening: what it blackens, how much, and that it can be repeated."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from papo.corruption.patches import RandomPatchConfig, random_patch
from verl.config.option import check_options


def white(width: int = 280, height: int = 420) -> Image.Image:
    return Image.new("RGB", (width, height), "white")


def blackened(image: Image.Image) -> np.ndarray:
    return (np.array(image) == 0).all(axis=-1)


def test_whole_patches_are_black_and_the_rest_is_untouched():
    black = blackened(random_patch(white(), np.random.default_rng(1), RandomPatchConfig()))
    patches = black.reshape(30, 14, 20, 14).transpose(0, 2, 1, 3).reshape(600, -1)
    assert (patches.all(axis=1) | ~patches.any(axis=1)).all()
    result = np.array(random_patch(white(), np.random.default_rng(1), RandomPatchConfig()))
    assert (result[~black] == 255).all()


@pytest.mark.parametrize("prob", [0.2, 0.6, 0.9])
def test_expected_fraction(prob):
    config = RandomPatchConfig(prob=prob)
    shares = [blackened(random_patch(white(), np.random.default_rng(i), config)).mean() for i in range(20)]
    patches = 20 * 600
    assert abs(np.mean(shares) - prob) < 4 * np.sqrt(prob * (1 - prob) / patches)
    assert np.std(shares) > 0  # each patch on its own, not an exact number of them


@pytest.mark.parametrize("prob", [0.0, 1.0])
def test_nothing_and_everything(prob):
    assert blackened(random_patch(white(), np.random.default_rng(0), RandomPatchConfig(prob=prob))).mean() == prob


def test_same_seed_same_mask_other_seed_other_mask():
    masks = [blackened(random_patch(white(), np.random.default_rng(s), RandomPatchConfig())) for s in (5, 5, 6)]
    assert (masks[0] == masks[1]).all() and (masks[0] != masks[2]).any()


def test_sizes_that_are_no_multiple_of_the_patch():
    assert random_patch(white(15, 29), np.random.default_rng(0), RandomPatchConfig(prob=1.0)).size == (15, 29)
    assert random_patch(white(5, 3), np.random.default_rng(0), RandomPatchConfig(prob=1.0)).size == (5, 3)


def test_options_without_meaning_are_refused_by_key():
    with pytest.raises(ValueError, match="algorithm.views.masked.prob=1.5"):
        check_options(RandomPatchConfig(prob=1.5), "algorithm.views.masked")
    with pytest.raises(ValueError, match="patch_size=0"):
        check_options(RandomPatchConfig(patch_size=0), "algorithm.views.masked")

"""Every strategy: how much it hides, what it leaves alone, and that it can be repeated."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

import papo.corruption.patches  # noqa: F401  (registers)
from verl.config.option import check_options
from verl.data.images import open_image
from verl.data.views import VIEW_CONFIGS, transform

KEY = "algorithm.views.masked"
SHARES = ("random_patch", "pixel", "grid", "block")  # what hides `prob` of the picture


def config(kind: str, **options):
    made = VIEW_CONFIGS[kind](**options)
    check_options(made, KEY)
    return made


def picture(width: int = 280, height: int = 420, seed: int = 0) -> Image.Image:
    """Random colours, none of them black."""
    values = np.random.default_rng(seed).integers(1, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def hidden(image: Image.Image) -> np.ndarray:
    return (np.array(image) == 0).all(axis=-1)


@pytest.mark.parametrize("kind", SHARES)
@pytest.mark.parametrize("prob", [0.25, 0.5, 0.6])
def test_the_share_hidden_is_prob_and_the_rest_is_untouched(kind, prob):
    image = picture()
    masked = transform(image, config(kind, prob=prob), seed=3)
    black = hidden(masked)
    assert abs(black.mean() - prob) < {"random_patch": 0.08, "grid": 0.02}.get(kind, 0.01)
    assert (np.array(masked)[~black] == np.array(image)[~black]).all()


@pytest.mark.parametrize("kind", SHARES)
@pytest.mark.parametrize("prob", [0.0, 1.0])
def test_nothing_and_everything(kind, prob):
    assert hidden(transform(picture(57, 43), config(kind, prob=prob), seed=0)).mean() == prob


@pytest.mark.parametrize("kind", ["random_patch", "grid"])
def test_exact_hides_an_exact_number_of_whole_patches(kind):
    for seed in range(10):
        black = hidden(transform(picture(), config(kind, prob=0.37, exact=True), seed))
        patches = black.reshape(30, 14, 20, 14).transpose(0, 2, 1, 3).reshape(600, -1)
        assert (patches.all(axis=1) == patches.any(axis=1)).all()
        assert patches.any(axis=1).sum() == round(0.37 * 600)


@pytest.mark.parametrize("kind", [*SHARES, "gaussian_noise"])
def test_the_seed_decides(kind):
    made = [np.array(transform(picture(), config(kind), seed)) for seed in (5, 5, 6, 7)]
    assert (made[0] == made[1]).all()
    assert any((made[0] != other).any() for other in made[2:])


@pytest.mark.parametrize("kind", [*SHARES, "gaussian_noise", "blank"])
@pytest.mark.parametrize("size", [(15, 29), (5, 3), (1, 1)])
def test_sizes_stay(kind, size):
    assert transform(picture(*size), config(kind), seed=0).size == size


def test_a_grid_of_a_half_is_a_checkerboard_and_of_a_quarter_touches_nowhere():
    cells = hidden(transform(picture(160, 160), config("grid", prob=0.5, patch_size=10), 1))[::10, ::10]
    parity = np.indices(cells.shape).sum(axis=0) % 2 == 1
    assert (cells == parity).all() or (cells == ~parity).all()
    cells = hidden(transform(picture(160, 160), config("grid", prob=0.25, patch_size=10), 1))[::10, ::10]
    assert not (cells[1:] & cells[:-1]).any() and not (cells[:, 1:] & cells[:, :-1]).any()


def test_a_block_is_one_rectangle_of_varying_shape():
    shapes = set()
    for seed in range(10):
        black = hidden(transform(picture(), config("block", prob=0.3), seed))
        rows, columns = black.any(axis=1).sum(), black.any(axis=0).sum()
        assert black.sum() == rows * columns and abs(black.mean() - 0.3) < 0.003
        shapes.add((rows, columns))
    assert len(shapes) > 5


def test_blocks_and_grids_begin_anywhere():
    for kind in ("block", "grid"):
        made = [hidden(transform(picture(), config(kind, prob=1 / 64), seed)) for seed in range(20)]
        corners = [np.argwhere(black).min(axis=0) for black in made]
        assert len({top for top, _ in corners}) > 4 and len({left for _, left in corners}) > 4, kind


def test_noise_has_its_standard_deviation_and_is_clipped():
    gray = Image.new("RGB", (300, 300), (128, 128, 128))
    change = np.array(transform(gray, config("gaussian_noise", std=0.1), 1)).astype(float) - 128
    assert abs(change.std() - 25.5) < 0.3 and abs(change.mean()) < 0.3
    assert abs(np.corrcoef(change[..., 0].ravel(), change[..., 1].ravel())[0, 1]) < 0.02  # each value on its own
    strong = np.array(transform(gray, config("gaussian_noise", std=2.0), 1))
    assert ((strong == 0) | (strong == 255)).mean() > 0.7


def test_blank_is_one_colour():
    assert transform(picture(9, 7), config("blank"), 0).getcolors() == [(63, (0, 0, 0))]
    assert transform(picture(9, 7), config("blank", color="#336699"), 0).getcolors() == [(63, (0x33, 0x66, 0x99))]


@pytest.mark.parametrize(
    "kind, options, named",
    [
        ("grid", {"prob": -0.1}, "masked.prob=-0.1"),
        ("block", {"prob": 1.1}, "masked.prob=1.1"),
        ("pixel", {"patch_size": 0}, "masked.patch_size=0"),
        ("gaussian_noise", {"std": -1.0}, "masked.std=-1"),
        ("gaussian_noise", {"std": float("nan")}, "masked.std=nan"),
        ("blank", {"color": "blackish"}, "masked.color='blackish'"),
        ("precomputed", {}, "masked.column is not set"),
    ],
)
def test_options_without_meaning_are_refused_by_key(kind, options, named):
    with pytest.raises(ValueError, match=named):
        config(kind, **options)


def encoded(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


COLOURS = np.array([(250, 10, 20), (30, 240, 50), (60, 70, 230), (200, 200, 30)], dtype=np.uint8)
GRAY = np.arange(1, 251, dtype=np.uint8).repeat(250).reshape(250, 250)


def modes() -> dict[str, tuple[Image.Image, np.ndarray]]:
    """A picture in each mode, and the RGB values [250, 250, 3] that it shows."""
    index = np.random.default_rng(2).integers(0, 4, (250, 250)).astype(np.uint8)
    palette = Image.fromarray(index, mode=None).convert("P")
    palette.putdata(index.ravel().tolist())
    palette.putpalette(COLOURS.ravel().tolist())
    gray = GRAY[..., None].repeat(3, axis=2)
    clear = index == 0
    alpha = np.dstack([COLOURS[index], np.where(clear, 0, 255).astype(np.uint8)])
    return {
        "P": (palette, COLOURS[index]),
        "L": (Image.fromarray(GRAY), gray),
        "RGBA": (Image.fromarray(alpha), np.where(clear[..., None], np.uint8(255), COLOURS[index])),
        "I;16": (Image.fromarray(GRAY.astype(np.uint16) * 257 + 60), gray),
    }


@pytest.mark.parametrize("mode", ["P", "L", "RGBA", "I;16"])
@pytest.mark.parametrize("kind", SHARES)
def test_pictures_that_are_not_rgb_keep_their_colours_where_nothing_is_hidden(mode, kind):
    source, wanted = modes()[mode]
    assert source.mode == mode
    image = open_image(encoded(source), None)
    assert image.mode == "RGB" and (np.array(image) == wanted).all()
    masked = transform(image, config(kind, prob=0.4), seed=1)
    black = hidden(masked)
    assert 0.3 < black.mean() < 0.5 and (np.array(masked)[~black] == wanted[~black]).all()

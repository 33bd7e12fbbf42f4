"""Semantic masking, with a tiny random DINOv2."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Dinov2Config, Dinov2Model

from papo.corruption.attention import AttentionConfig, load_dino, saliency
from tests.papo.test_corruption import hidden, picture
from verl.config.option import check_options
from verl.data.views import transform

LAYERS = [1, 2]


@pytest.fixture(scope="module")
def dino(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("dino"))
    torch.manual_seed(0)
    shape = Dinov2Config(
        hidden_size=32, num_hidden_layers=4, num_attention_heads=2, image_size=56, patch_size=14, initializer_range=0.5
    )
    Dinov2Model(shape).save_pretrained(folder)
    return folder


def test_saliency_is_attention_received_from_the_other_patches(dino):
    image = picture(70, 42)
    found = saliency(image, load_dino(dino, max(LAYERS)), LAYERS, max_patches=100)
    whole = Dinov2Model.from_pretrained(dino, attn_implementation="eager")
    pixels = (np.array(image) / 255 - (0.485, 0.456, 0.406)) / (0.229, 0.224, 0.225)
    with torch.no_grad():
        seen = whole(torch.tensor(pixels).float().permute(2, 0, 1)[None], output_attentions=True).attentions
    wanted = np.zeros(15)
    for layer in LAYERS:
        for receiver in range(15):
            givers = [j for j in range(15) if j != receiver]
            received = [float(seen[layer][0, head, j + 1, receiver + 1]) for head in range(2) for j in givers]
            wanted[receiver] += sum(received) / 2 / len(LAYERS)
    np.testing.assert_allclose(found, wanted.reshape(3, 5), rtol=1e-4)


@pytest.mark.parametrize("prob", [0.0, 0.3, 0.5, 1.0])
def test_the_most_salient_patches_are_black_and_the_rest_is_untouched(dino, prob):
    image = picture(70, 42)
    masked = transform(image, AttentionConfig(model_path=dino, layers=LAYERS, prob=prob), seed=0)
    patches = hidden(masked).reshape(3, 14, 5, 14).transpose(0, 2, 1, 3).reshape(15, -1)
    assert (patches.all(axis=1) == patches.any(axis=1)).all()
    scores = saliency(image, load_dino(dino, max(LAYERS)), LAYERS, 100).ravel()
    assert set(np.flatnonzero(patches.any(axis=1))) == set(np.argsort(scores)[15 - math.floor(prob * 15) :])
    assert (np.array(masked)[~hidden(masked)] == np.array(image)[~hidden(masked)]).all()


def test_large_pictures_have_larger_patches_and_odd_sizes_are_covered(dino):
    config = AttentionConfig(model_path=dino, layers=LAYERS, prob=0.5, max_patches=16)
    masked = transform(picture(283, 271), config, seed=0)
    assert masked.size == (283, 271) and abs(hidden(masked).mean() - 0.5) < 0.1
    assert saliency(picture(283, 271), load_dino(dino, 2), LAYERS, 16).size <= 16
    assert transform(Image.new("RGB", (3, 90), "white"), config, seed=0).size == (3, 90)


def test_a_model_is_loaded_once(dino):
    assert load_dino(dino, 2) is load_dino(dino, 2)


@pytest.mark.parametrize(
    "options, error, named",
    [
        ({"layers": []}, ValueError, r"masked.layers=\[\]"),
        ({"layers": [2, 4]}, ValueError, "masked.layers goes up to 4; .* has 0 to 3"),
        ({"model_path": "./nowhere"}, FileNotFoundError, "masked.model_path=.*nowhere"),
        ({"max_patches": 0}, ValueError, "masked.max_patches=0"),
        ({"prob": 3.0}, ValueError, "masked.prob=3"),
    ],
)
def test_what_cannot_be_loaded_is_refused_by_key(dino, options, error, named):
    with pytest.raises(error, match=named):
        check_options(AttentionConfig(**{"model_path": dino, "layers": LAYERS, **options}), "algorithm.views.masked")


def test_another_kind_of_model_is_refused(assets):
    with pytest.raises(ValueError, match="masked.model_path=.* a dinov2 is needed"):
        check_options(AttentionConfig(model_path=str(assets / "model")), "algorithm.views.masked")

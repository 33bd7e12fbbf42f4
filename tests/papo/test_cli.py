"""The command `papo`."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from papo.cli import main
from papo.corruption.patches import RandomPatchConfig
from tests.papo.test_corruption import picture
from verl.data.thumbnails import GAP
from verl.data.views import transform


@pytest.fixture
def image(tmp_path):
    picture(84, 56).save(tmp_path / "cat.png")
    return tmp_path / "cat.png"


def test_mask_writes_both_pictures_side_by_side_and_says_where(image, capsys):
    main(["mask", str(image), "--seed", "4", "prob=0.3", "patch_size=7", "exact=true"])
    out = image.with_name("cat_masked.png")
    assert capsys.readouterr().out == f"{out}\n"
    both = np.array(Image.open(out))
    assert both.shape == (56, 2 * 84 + GAP, 3)
    assert (both[:, :84] == np.array(picture(84, 56))).all()
    masked = transform(picture(84, 56), RandomPatchConfig(prob=0.3, patch_size=7, exact=True), 4)
    assert (both[:, 84 + GAP :] == np.array(masked)).all()
    assert sorted(p.name for p in image.parent.iterdir()) == ["cat.png", "cat_masked.png"]


def test_options_may_stand_before_and_after_flags_and_the_strategy_can_be_chosen(image, tmp_path):
    out = tmp_path / "folder" / "b.png"
    main(["mask", str(image), "color=red", "--strategy", "blank", "--out", str(out)])
    assert (np.array(Image.open(out))[:, 84 + GAP :] == (255, 0, 0)).all()
    main(["mask", str(image), "--strategy", "blank", "--out", str(out), "color=lime"])
    assert (np.array(Image.open(out))[:, 84 + GAP :] == (0, 255, 0)).all()


def test_resized_shows_the_picture_as_a_model_sees_it(image, assets):
    with pytest.raises(SystemExit, match="--model"):
        main(["mask", str(image), "stage=resized"])
    main(["mask", str(image), "stage=resized", "--model", str(assets / "model")])
    width, height = Image.open(image.with_name("cat_masked.png")).size
    assert height % 28 == 0 and (width - GAP) % 56 == 0 and height * (width - GAP) / 2 >= 200704


@pytest.mark.parametrize(
    "arguments, named",
    [
        (["bogus=1"], "Key 'bogus'.*patch_size"),
        (["prob=much"], "'much'"),
        (["prob=2"], "prob=2"),
        (["prob"], "'prob' is no key=value"),
        (["--strategy", "nope"], "unknown view 'nope'.*random_patch"),
        (["--strategy", "attention"], "model_path="),
        (["kind=grid"], "--strategy"),
        (["column=a"], "dataset"),
    ],
)
def test_mistakes_end_in_one_line(image, arguments, named):
    with pytest.raises(SystemExit, match=named) as found:
        main(["mask", str(image), *arguments])
    assert str(found.value).startswith("error: ") and "\n" not in str(found.value)
    assert not image.with_name("cat_masked.png").exists()


def test_a_file_that_is_no_picture_and_a_flag_that_is_none(tmp_path, capsys):
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(SystemExit, match="cannot be read"):
        main(["mask", str(tmp_path / "a.png")])
    with pytest.raises(SystemExit, match="no image file"):
        main(["mask", str(tmp_path / "b.png")])
    with pytest.raises(SystemExit):
        main(["mask", str(tmp_path / "a.png"), "--bogus"])
    assert "unknown: --bogus" in capsys.readouterr().err


def test_train_is_the_trainers_own_command(in_repository, capsys):
    main(["train", "quickstart", "trainer.max_steps=3", "--print-config"])
    assert "max_steps: 3" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="there is no preset 'quikstart'"):
        main(["train", "quikstart"])

"""Whatever a file holds: prompts, or an error that names the row."""

from __future__ import annotations

import base64
import warnings

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.data.test_images import encoded
from verl.config.data import DataConfig, PromptTruncation
from verl.data.collate import PromptCollator
from verl.data.dataset import PromptDataset
from verl.data.images import image_size, open_image
from verl.data.overlong import prompt_lengths
from verl.data.vision import VisionProcessor

FORMATS = {"PNG": ("RGB", "RGBA", "L", "P", "1", "I;16", "LA"), "JPEG": ("RGB", "L", "CMYK"), "GIF": ("P", "L")}
FORMATS |= {"TIFF": ("RGB", "CMYK", "I;16", "F", "I", "LAB"), "WEBP": ("RGB", "RGBA"), "BMP": ("RGB", "P", "1")}
FORMATS |= {"PPM": ("RGB", "L"), "AVIF": ("RGB",)}
# No example may take longer: none may hang.
LIMITS = {"deadline": 30_000, "suppress_health_check": list(HealthCheck)}


@st.composite
def files(draw) -> bytes:
    """An image as a file, most of them with some bytes changed, added or missing."""
    format = draw(st.sampled_from(sorted(FORMATS)))
    size = draw(st.tuples(st.integers(1, 90), st.integers(1, 90)))
    image = Image.new(draw(st.sampled_from(FORMATS[format])), size)
    exif = Image.Exif()
    exif[0x0112] = draw(st.integers(0, 9))
    data = bytearray(encoded(image, format, **({"exif": exif} if format in ("PNG", "JPEG", "WEBP", "TIFF") else {})))
    for place, value in draw(st.lists(st.tuples(st.integers(0, len(data) - 1), st.integers(0, 255)), max_size=4)):
        data[place] = value
    cut = draw(st.one_of(st.none(), st.integers(0, len(data))))
    return bytes(data[:cut]) + draw(st.binary(max_size=8))


texts = st.one_of(
    st.text(max_size=40),
    st.sampled_from(
        ["a.png", "https://x.org/a.png", "data:image/png;base64,", "data:,", "../..", "/dev/zero", "/", ""]
    ),
    files().map(lambda data: base64.b64encode(data).decode()),
    files().map(lambda data: "data:image/png;base64," + base64.b64encode(data).decode()),
)
images = st.recursive(
    st.one_of(files(), st.binary(max_size=60), texts, st.none(), st.integers(), st.floats()),
    lambda inner: st.one_of(
        st.dictionaries(st.sampled_from(["bytes", "path", "url"]), inner, max_size=2), st.lists(inner, max_size=2)
    ),
    max_leaves=3,
)


@settings(max_examples=600, **LIMITS)
@given(images)
def test_an_image_is_a_picture_or_an_error_with_a_name(image):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow warns of broken files before it gives up
        try:
            picture = open_image(image, None)
        except (ValueError, FileNotFoundError) as error:
            assert "image" in str(error)
            return
        assert picture.mode == "RGB" and picture.size == image_size(image, None)


pieces = st.one_of(st.text(max_size=30), st.sampled_from(["<image>", "<|image_pad|>", "<|im_end|>", "\n\n", "{{ x }}"]))
rows = st.fixed_dictionaries(
    {
        "problem": st.one_of(st.none(), st.lists(pieces, max_size=6).map("".join)),
        "answer": st.one_of(st.none(), st.text(max_size=10), st.just("7")),
        "images": st.one_of(st.none(), st.lists(st.tuples(st.one_of(st.none(), files()), st.none()), max_size=2)),
    }
)
good = st.builds(
    lambda words, size, answer: {
        "problem": f"<image>{words}",
        "answer": f"{answer}",
        "images": [(encoded(Image.new("RGB", size)), None)],
    },
    st.text(max_size=400).filter(lambda text: "<" not in text),
    st.tuples(st.integers(1, 300), st.integers(2, 300)),
    st.integers(0, 9),
)


@pytest.fixture(scope="module")
def vision(assets):
    return VisionProcessor(str(assets / "model"), min_pixels=784, max_pixels=12544)


@settings(max_examples=60, **LIMITS)
@given(
    st.lists(st.one_of(rows, good, good, good), min_size=1, max_size=4),
    st.booleans(),
    st.sampled_from([None, PromptTruncation.left]),
    st.integers(16, 200),
)
def test_a_file_is_prompts_or_an_error_that_names_file_and_row(tmp_path_factory, vision, found, counts, fate, limit):
    folder = tmp_path_factory.mktemp("fuzz")
    path = str(folder / "a.parquet")
    schema = pa.schema(
        [
            ("problem", pa.string()),
            ("answer", pa.string()),
            ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
        ]
    )
    records = [
        row | {"images": None if row["images"] is None else [{"bytes": b, "path": p} for b, p in row["images"]]}
        for row in found
    ]
    pq.write_table(pa.Table.from_pylist(records, schema), path)
    config = DataConfig(filter_overlong_prompts=counts, truncation=fate, max_prompt_length=limit)
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        patch.setattr("datasets.config.HF_DATASETS_CACHE", folder)
        try:
            data = PromptDataset(path, "data.train_files", config, vision)
            items = [data[i] for i in range(len(data))]
        except ValueError as error:
            assert "a.parquet', row " in str(error) or "every prompt is longer" in str(error)
            return
        if fate is None:
            lengths = prompt_lengths(data.rows, vision)
            assert [len(item["prompt_ids"]) for item in items] == lengths[data.indices].tolist()
    assert len(PromptCollator(vision.special.pad)(items)) == len(data)
    for item in items:
        assert 0 < len(item["prompt_ids"]) <= limit and item["answer"].strip()

"""The handwritten-digits task: two to four digits side by side, "Add the digits."

The pictures are the 8x8 UCI digits that scikit-learn ships, so nothing is downloaded. Each digit is enlarged to
28x28 pixels, which Qwen2.5-VL (patches of 14 pixels, merged 2x2) turns into exactly one vision token.

Three parquet files are written, in the columns of PAPO_ViRL39K. No source image is used in two of them:
`sft.parquet` teaches the format and some reading, `train.parquet` gives only final answers, and `val.parquet`
measures what is learnt on digits never seen.
"""

import io
import logging
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from sklearn.datasets import load_digits
from tqdm import tqdm

from papo.quickstart.artifacts import is_current, new_folder

logger = logging.getLogger(__name__)

DIGIT_PIXELS = 28
PROBLEM = "<image>Add the digits."
# A fixed seed: the validation digits stay unseen whatever seed the rows are composed with.
SPLIT_SEED = 20250706

IMAGE_TYPE = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))


@dataclass(frozen=True)
class DigitsSettings:
    """Sizes of the three files; `*_images` counts source digits (1,797 exist), `*_rows` pictures made from them."""

    sft_images: int = 400
    sft_rows: int = 2000
    train_images: int = 1000
    train_rows: int = 2048
    val_rows: int = 256
    # Probability of a picture of 2, 3 and 4 digits.
    mix: tuple[float, float, float] = (0.60, 0.25, 0.15)


DEFAULT_SETTINGS = DigitsSettings()


def solution_text(digits: list[int]) -> str:
    """Return the worked response: `[3, 5, 6]` becomes `<think>3+5+6</think>\\boxed{14}`."""
    return f"<think>{'+'.join(map(str, digits))}</think>\\boxed{{{sum(digits)}}}"


def build_data(out_dir: str | Path, seed: int = 0, settings: DigitsSettings = DEFAULT_SETTINGS) -> Path:
    """Write `sft.parquet`, `train.parquet` and `val.parquet`, or reuse them where the same settings made them.

    Columns: `images` (list of {bytes: PNG, path: stable name}), `problem`, `answer`; `sft.parquet` adds
    `solution`, the full response.

    Args:
        out_dir: A folder of their own; it is replaced as a whole.
        seed: Chooses which digits meet in a picture. The split into three does not depend on it.

    Returns:
        `out_dir`.

    Raises:
        ValueError: `out_dir` holds foreign files, or more source images are asked for than exist.
    """
    out_dir = Path(out_dir)
    recipe = {"kind": "digits", "version": 1, "seed": seed, **asdict(settings)}
    if is_current(out_dir, recipe):
        logger.info("Reusing the data in %s.", out_dir)
    else:
        write_data(out_dir, recipe, compose(settings, seed))
    return out_dir


def compose(settings: DigitsSettings, seed: int) -> dict[str, list[dict[str, Any]]]:
    """The rows of each file by its name, with a column `digits` that is not written."""
    pictures, labels = _load_pictures()
    counts = {"sft": settings.sft_rows, "train": settings.train_rows, "val": settings.val_rows}
    files = {}
    for index, (name, pool) in enumerate(_split(labels, settings).items()):
        rng = np.random.default_rng([seed, index])
        rows = _compose(pictures, labels, pool, counts[name], settings.mix, name, rng)
        files[name] = list(tqdm(rows, total=counts[name], desc=f"digits: {name}", leave=False))
    return files


def write_data(out_dir: Path, recipe: dict[str, Any], files: dict[str, list[dict[str, Any]]]) -> None:
    """Write each of `files` as a parquet file, and `recipe` as the settings that made them."""
    with new_folder(out_dir, recipe) as folder:
        for name, rows in files.items():
            _write(folder / f"{name}.parquet", rows, with_solution=name == "sft")
    counts = ", ".join(f"{len(rows)} {name}" for name, rows in files.items())
    logger.info("Wrote %s pictures to %s.", counts, out_dir)


def _load_pictures() -> tuple[np.ndarray, np.ndarray]:
    """Return the digits as dark ink on white, uint8 [1797, 28, 28], and their labels [1797]."""
    source = load_digits()
    pictures = []
    for image in source.images:  # [8, 8], ink from 0 to 16
        small = Image.fromarray((255 - image * (255 / 16)).astype(np.uint8))
        pictures.append(np.asarray(small.resize((DIGIT_PIXELS, DIGIT_PIXELS), Image.Resampling.BICUBIC)))
    return np.stack(pictures), source.target


def _split(labels: np.ndarray, settings: DigitsSettings) -> dict[str, np.ndarray]:
    """Return the source indices of each file, disjoint by construction."""
    order = np.random.default_rng(SPLIT_SEED).permutation(len(labels))
    sft_end = settings.sft_images
    train_end = sft_end + settings.train_images
    if train_end >= len(order):
        raise ValueError(f"sft_images + train_images = {train_end} leaves none of the {len(order)} for validation.")
    return {"sft": order[:sft_end], "train": order[sft_end:train_end], "val": order[train_end:]}


def _compose(
    pictures: np.ndarray,
    labels: np.ndarray,
    pool: np.ndarray,
    num_rows: int,
    mix: tuple[float, float, float],
    name: str,
    rng: np.random.Generator,
) -> Iterator[dict[str, Any]]:
    """Yield rows whose digits are drawn from `pool`; each source image is used about equally often."""
    deck: list[int] = []
    for row in range(num_rows):
        num_digits = int(rng.choice([2, 3, 4], p=mix))
        if len(deck) < num_digits:
            deck = rng.permutation(pool).tolist() + deck
        chosen = [deck.pop() for _ in range(num_digits)]
        digits = labels[chosen].tolist()
        yield {
            "images": [{"bytes": png(pictures[chosen]), "path": f"{name}-{row:05d}.png"}],
            "digits": digits,
            "problem": PROBLEM,
            "answer": str(sum(digits)),
            "solution": solution_text(digits),
        }


def png(digits: np.ndarray) -> bytes:
    """Encode digits uint8 [k, 28, 28], side by side, as one RGB PNG of 28k x 28 pixels."""
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate(list(digits), axis=1)).convert("RGB").save(buffer, format="PNG")
    return buffer.getvalue()


def _write(path: Path, rows: list[dict[str, Any]], with_solution: bool) -> None:
    fields = [("images", IMAGE_TYPE), ("problem", pa.string()), ("answer", pa.string())]
    if with_solution:
        fields.append(("solution", pa.string()))
    schema = pa.schema(fields)
    # from_pylist takes only the columns of the schema: neither `solution` nor `digits` leaks into the RL files.
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)

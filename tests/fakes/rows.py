"""Small data files for tests, in the columns of PAPO_ViRL39K."""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image


def png(width: int = 56, height: int = 28, mode: str = "RGB", colour=None) -> bytes:
    buffer = io.BytesIO()
    colour = colour if colour is not None else {"RGB": (200, 30, 90), "L": 77, "P": 3, "RGBA": (9, 90, 200, 128)}[mode]
    Image.new(mode, (width, height), colour).save(buffer, format="PNG")
    return buffer.getvalue()


def row(problem: str = "<image>Add the digits.", images: int = 1, answer: str = "7", **size) -> dict:
    pictures = [{"bytes": png(**size), "path": None} for _ in range(images)]
    return {"images": pictures, "problem": problem, "answer": answer}


def write_parquet(path: Path, rows: list[dict]) -> str:
    images = pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    schema = pa.schema([("images", images), ("problem", pa.string()), ("answer", pa.string())])
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path)
    return str(path)

"""Output folder of a run, in which no file is ever half written."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
from typing import Any

from omegaconf import OmegaConf
from PIL import Image

from verl.checkpoint.files import sync
from verl.config.config import Config
from verl.tracking.curves import draw_curves
from verl.tracking.run_info import machine, settings
from verl.utils.files import atomic_path

logger = logging.getLogger(__name__)

RECORDS = ("metrics.jsonl", "samples.jsonl", "events.jsonl", "reward_failures.jsonl")
UNFINISHED = re.compile(r".+\.(tmp|old)\d+")


class RunDir:
    """`trainer.output_dir`. An earlier run found there is moved aside, never mixed into or overwritten, unless this is
    the same run, which goes on after `resumed_step`: then its records of later steps are cut off.

    Raises ValueError for a folder that holds anything else.
    """

    def __init__(self, config: Config, resumed_step: int | None = None) -> None:
        self.path = os.path.abspath(config.trainer.output_dir)
        if resumed_step is not None:
            self._go_on_after(resumed_step)
        elif os.path.exists(self.path) and (not os.path.isdir(self.path) or os.listdir(self.path)):
            if not os.path.isfile(self.file("config.yaml")):
                raise ValueError(f"trainer.output_dir='{self.path}' holds files that are not a run's: name another")
            aside = _free_name(self.path)
            os.rename(self.path, aside)
            logger.info("an earlier run in %s was moved to %s", self.path, aside)
        os.makedirs(self.path, exist_ok=True)
        with atomic_path(self.file("config.yaml")) as temporary:
            OmegaConf.save(OmegaConf.create(settings(config)), temporary)
        found = machine()
        if found != self._read_json("machine.json"):  # a complete run that is started again stays as it is
            self._write_json("machine.json", found)

    def _go_on_after(self, step: int) -> None:
        for name in sorted(os.listdir(self.path)):
            if UNFINISHED.fullmatch(name):
                path = self.file(name)
                shutil.rmtree(path) if os.path.isdir(path) else os.remove(path)
                logger.info("removed %s, which a write that was cut short had left", path)
        for name in RECORDS:
            if os.path.exists(self.file(name)):
                cut_after(self.file(name), step)

    def sync(self) -> None:
        """Bring the records to the disk."""
        for name in RECORDS:
            if os.path.exists(self.file(name)):
                sync(self.file(name))

    def file(self, name: str) -> str:
        return os.path.join(self.path, name)

    def add_samples(self, step: int, split: str, records: list[dict[str, Any]]) -> None:
        """Append generations to samples.jsonl; their pictures become files in `pictures`, named in the record."""
        for record in records:
            if found := record.get("pictures"):
                record["pictures"] = {name: self._add_picture(picture) for name, picture in found.items()}
        self._append("samples.jsonl", [{"step": step, "split": split, **record} for record in records])

    def _add_picture(self, picture: Image.Image) -> str:
        """Write a picture, once; returns its path within the folder."""
        path = os.path.join("pictures", f"{hashlib.sha1(picture.tobytes()).hexdigest()[:16]}.jpg")
        if not os.path.isfile(self.file(path)):
            os.makedirs(self.file("pictures"), exist_ok=True)
            with atomic_path(self.file(path)) as temporary:
                picture.save(temporary, format="JPEG", quality=85)
        return path

    def add_events(self, events: list[dict[str, Any]]) -> None:
        """Append events of the watchdog to events.jsonl. Open bounds are null."""
        self._append("events.jsonl", events)

    def add_failures(self, step: int, records: list[dict[str, Any]]) -> None:
        """Append responses that could not be graded to reward_failures.jsonl."""
        self._append("reward_failures.jsonl", [{"step": step, **record} for record in records])

    def _append(self, name: str, records: list[dict[str, Any]]) -> None:
        if records:
            with open(self.file(name), "a", encoding="utf-8") as file:
                file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)

    def write_summary(self, summary: dict[str, Any]) -> None:
        self._write_json("summary.json", summary)

    def _write_json(self, name: str, value: dict[str, Any]) -> None:
        with atomic_path(self.file(name)) as temporary, open(temporary, "w", encoding="utf-8") as file:
            json.dump(value, file, indent=2)
            file.write("\n")

    def read_summary(self) -> dict[str, Any] | None:
        """summary.json; None where the run has not come to its end."""
        return self._read_json("summary.json")

    def _read_json(self, name: str) -> dict[str, Any] | None:
        if not os.path.exists(self.file(name)):
            return None
        with open(self.file(name), encoding="utf-8") as file:
            return json.load(file)

    def remove_summary(self) -> None:
        """Take back the end of a run that goes on."""
        if os.path.exists(self.file("summary.json")):
            os.remove(self.file("summary.json"))

    def draw_curves(self) -> None:
        if os.path.exists(self.file("metrics.jsonl")):
            draw_curves(self.file("metrics.jsonl"), self.file("curves.png"))


def cut_after(path: str, step: int) -> None:
    """Leave out the records of later steps, and a last line that is not whole."""
    kept, dropped = [], 0
    with open(path, encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
            else:
                dropped += 1
    if not dropped:
        return
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.writelines(kept)
    logger.info("%s: %d lines of steps after %d are cut off", path, dropped, step)


def _free_name(path: str) -> str:
    number = 1
    while os.path.exists(f"{path}.previous-{number}"):
        number += 1
    return f"{path}.previous-{number}"

"""TensorBoard: event files in the run's folder."""

from __future__ import annotations

import os
import textwrap

import numpy as np
from PIL import Image

from verl.config.config import Config
from verl.tracking.registry import TRACKERS, Row, Tracker
from verl.tracking.run_info import flat_settings

# What the HPARAMS tab lists beside a run's settings.
OUTCOMES = ("val/accuracy", "val/reward", "train/reward")


@TRACKERS.register("tensorboard")
class TensorBoardTracker(Tracker):
    """`tensorboard --logdir outputs` shows all runs; generations are under IMAGES and TEXT."""

    package = "tensorboard"

    def __init__(self, output_dir: str, config: Config) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from torch.utils.tensorboard.summary import hparams

        self.writer = SummaryWriter(os.path.join(output_dir, "tensorboard"))
        # SummaryWriter.add_hparams would write them as a run of their own.
        for summary in hparams(flat_settings(config), dict.fromkeys(OUTCOMES)):
            self.writer.file_writer.add_summary(summary)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def log_generations(self, step: int, rows: list[Row]) -> None:
        for index, row in enumerate(rows):
            tag = f"val_generations/{index}"
            texts = {name: cell for name, cell in row.items() if not isinstance(cell, Image.Image)}
            # Indented, so that Markdown leaves what the model wrote as it is.
            blocks = [f"**{name}**\n\n{textwrap.indent(str(cell), '    ')}" for name, cell in texts.items()]
            self.writer.add_text(tag, "\n\n".join(blocks), step)
            for name in row.keys() - texts.keys():
                self.writer.add_image(f"{tag}/{name}", np.asarray(row[name]), step, dataformats="HWC")

    def close(self, succeeded: bool) -> None:
        self.writer.close()

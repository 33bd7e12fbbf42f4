"""SwanLab."""

from __future__ import annotations

import os

from PIL import Image

from verl.config.config import Config
from verl.tracking.registry import TRACKERS, Row, Tracker
from verl.tracking.run_info import read_run_id, settings, write_run_id


@TRACKERS.register("swanlab")
class SwanLabTracker(Tracker):
    """Its files are in the run's folder. With SWANLAB_MODE=offline that is all, and `swanlab sync` sends them later."""

    package = "swanlab"

    def __init__(self, output_dir: str, config: Config) -> None:
        import swanlab

        self.swanlab = swanlab
        log_dir = os.path.join(output_dir, "swanlab")
        os.makedirs(log_dir, exist_ok=True)
        run_id = read_run_id(output_dir, "swanlab")
        self.run = swanlab.init(
            project=config.trainer.project_name,
            name=config.trainer.experiment_name,
            id=run_id,
            resume="allow" if run_id else None,
            log_dir=log_dir,
            config=settings(config),
        )
        write_run_id(output_dir, "swanlab", self.run.id)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.run.log(metrics, step=step)

    def log_generations(self, step: int, rows: list[Row]) -> None:
        media: dict[str, list] = {"text": []}
        for row in rows:
            lines = [f"{name}: {cell}" for name, cell in row.items() if not isinstance(cell, Image.Image)]
            media["text"].append(self.swanlab.Text("\n".join(lines), caption=row["uid"]))
            for name, cell in row.items():
                if isinstance(cell, Image.Image):
                    media.setdefault(name, []).append(self.swanlab.Image(cell, caption=row["uid"]))
        self.run.log({f"val_generations/{name}": shown for name, shown in media.items()}, step=step)

    def close(self, succeeded: bool) -> None:
        if succeeded:
            self.run.finish()
        else:
            self.run.finish(state="crashed", error="the run ended with an error; its log says which")

"""Weights & Biases."""

from __future__ import annotations

from typing import Any

from PIL import Image

from verl.config.config import Config
from verl.tracking.registry import TRACKERS, Row, Tracker
from verl.tracking.run_info import read_run_id, settings, write_run_id


@TRACKERS.register("wandb")
class WandbTracker(Tracker):
    """Its files are in the run's folder. With WANDB_MODE=offline that is all, and `wandb sync` sends them later."""

    package = "wandb"

    def __init__(self, output_dir: str, config: Config) -> None:
        import wandb

        self.wandb = wandb
        run_id = read_run_id(output_dir, "wandb")
        self.run = wandb.init(
            project=config.trainer.project_name,
            name=config.trainer.experiment_name,
            id=run_id,
            resume="allow" if run_id else None,
            dir=output_dir,
            config=settings(config),
        )
        write_run_id(output_dir, "wandb", self.run.id)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.run.log(metrics, step=step)

    def log_generations(self, step: int, rows: list[Row]) -> None:
        columns = list(dict.fromkeys(name for row in rows for name in row))
        table = self.wandb.Table(
            columns=columns, data=[[self._cell(row.get(name)) for name in columns] for row in rows]
        )
        self.run.log({"val/generations": table}, step=step)

    def close(self, succeeded: bool) -> None:
        self.run.finish(exit_code=0 if succeeded else 1)

    def _cell(self, cell: Any) -> Any:
        return self.wandb.Image(cell) if isinstance(cell, Image.Image) else cell

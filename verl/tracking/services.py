"""Trackers of other packages: TensorBoard, Weights & Biases, MLflow and SwanLab, each imported when it is used."""

from __future__ import annotations

import os
import textwrap
from typing import Any

import numpy as np
from PIL import Image

from verl.config.config import Config
from verl.tracking.run_info import flat_settings, read_run_id, settings, write_run_id
from verl.tracking.trackers import TRACKERS, Row, Tracker

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


@TRACKERS.register("mlflow")
class MLflowTracker(Tracker):
    """Logs where MLFLOW_TRACKING_URI says, else where MLflow does by itself: a file in the current folder."""

    package = "mlflow"

    def __init__(self, output_dir: str, config: Config) -> None:
        import mlflow

        self.mlflow = mlflow
        mlflow.set_experiment(config.trainer.project_name)
        run_id = read_run_id(output_dir, "mlflow")
        run = mlflow.start_run(run_id=run_id, run_name=config.trainer.experiment_name)
        write_run_id(output_dir, "mlflow", run.info.run_id)
        if run_id is None:  # the parameters of a run cannot be changed later
            mlflow.log_params(flat_settings(config))

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.mlflow.log_metrics(metrics, step=step)

    def log_generations(self, step: int, rows: list[Row]) -> None:
        # mlflow.log_table would refuse a column in which only some rows have a picture.
        texts = [{name: cell for name, cell in row.items() if not isinstance(cell, Image.Image)} for row in rows]
        self.mlflow.log_dict({"step": step, "rows": texts}, f"val_generations/step_{step:06d}.json")
        for index, (row, text) in enumerate(zip(rows, texts, strict=True)):
            for name in row.keys() - text.keys():
                self.mlflow.log_image(row[name], key=f"val_generations/{index}/{name}", step=step)

    def close(self, succeeded: bool) -> None:
        self.mlflow.end_run("FINISHED" if succeeded else "FAILED")


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

"""MLflow."""

from __future__ import annotations

from PIL import Image

from verl.config.config import Config
from verl.tracking.registry import TRACKERS, Row, Tracker
from verl.tracking.run_info import flat_settings, read_run_id, write_run_id


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

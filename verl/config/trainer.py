"""`trainer.*`: how long, on what, and what a run leaves."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from verl.config.option import option


class Device(StrEnum):
    """Device of the models."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class OnSignal(StrEnum):
    """Treatment of the current step at the first SIGTERM or SIGINT."""

    finish_step = "finish_step"
    stop_now = "stop_now"


@dataclass
class TrainerConfig:
    """Length, machines, validation and output of a run."""

    project_name: str = option("papo", "name of the project, for trackers and folders")
    experiment_name: str | None = option(None, "name of the run; null: the preset's name")
    output_dir: str = option(
        "outputs/${trainer.project_name}/${trainer.experiment_name}",
        "folder of the run, which belongs to one process at a time and to one experiment",
    )
    total_epochs: int = option(2, "passes over the training data, where max_steps is null", above=0)
    max_steps: int | None = option(None, "steps of the run; null: total_epochs decides", least=1)
    seed: int = option(1, "seed of everything that has none of its own")
    device: Device = option(Device.auto, "cpu, cuda, or auto: GPUs where there are some")
    nnodes: int = option(1, "nodes", above=0)
    cluster_timeout_s: float = option(120.0, "seconds to wait for nodes and GPUs to join Ray", above=0)
    n_gpus_per_node: int = option(8, "training ranks per node: one per GPU, or one process each on CPU", above=0)
    peak_tflops: float | None = option(
        None,
        "bfloat16 TFLOP/s of a device, for perf/mfu; null: by its name, and no perf/mfu if that is not known",
        above=0,
    )
    max_try_make_batch: int = option(20, "most generations of a step with algorithm.online_filtering", above=0)
    val_only: bool = option(False, "validate the model and end; writes to output_dir with -validation behind its name")
    val_before_train: bool = option(True, "validate before the first step")
    val_freq: int = option(5, "steps between validations; 0: only before and after", least=0)
    val_after_train: bool = option(True, "validate after the last step")
    ahead: int = option(
        0, "1: begin a step's responses before the updates of the step before, on engines of their own", least=0, most=1
    )
    critic_warmup: int = option(0, "first steps in which only the critic trains", least=0)
    samples_per_step: int = option(4, "responses of each step that go to samples.jsonl; 0: none", least=0)
    val_generations_to_log: int = option(
        4, "validation responses with thumbnails for trackers that show pictures; 0: none", least=0
    )
    save_model: bool = option(True, "write the trained model as a Hugging Face folder at the end")
    save_freq: int = option(10, "steps between checkpoints, and one after the last; 0: never", least=0)
    save_limit: int = option(2, "newest checkpoints that are kept; 0: all", least=0)
    save_best: str | None = option(None, "metric of validation, such as val/accuracy, whose best step is kept too")
    save_model_only: bool = option(False, "leave the optimizer out: to be exported, not resumed")
    async_save: bool = option(False, "go on training from a copy on the CPU while a checkpoint is written")
    resume: str = option(
        "auto",
        "auto: go on from the newest whole checkpoint in output_dir, and refuse to if model, terms or views differ; "
        "never; or the path of a checkpoint",
    )
    on_signal: OnSignal = option(
        OnSignal.finish_step,
        "SIGTERM and SIGINT save a checkpoint and end with exit code 0: finish_step, or stop_now (a step whose updates "
        "have not begun is done again later)",
    )
    logger: list[str] = option(
        lambda: ["console", "jsonl"], "trackers: console, jsonl, tensorboard, wandb, mlflow, swanlab, or a plugin's"
    )

    def check(self, key: str) -> None:
        if self.save_best is not None and not self.save_best.startswith("val/"):
            raise ValueError(
                f"{key}.save_best='{self.save_best}': a metric of validation is needed, such as val/accuracy"
            )
        if self.save_best is not None and not (self.val_freq or self.val_after_train):
            raise ValueError(f"{key}.save_best={self.save_best} needs validation: set {key}.val_freq, or leave it out")
        if self.val_only and self.resume not in ("auto", "never"):
            raise ValueError(
                f"{key}.resume={self.resume} with {key}.val_only=true: to validate a checkpoint, export it and give "
                "the folder as worker.actor.model.model_path"
            )

"""`trainer.*`: how long, on what, and what a run leaves."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum


class Device(StrEnum):
    """Where models run; `auto` takes GPUs where there are some."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class OnSignal(StrEnum):
    """What the first SIGTERM or SIGINT leaves of a step."""

    finish_step = "finish_step"
    stop_now = "stop_now"


@dataclass
class TrainerConfig:
    """The run ends after `max_steps`, or after `total_epochs` where `max_steps` is not set.

    A run on several nodes, or on GPUs, waits `cluster_timeout_s` for them to join Ray.
    `n_gpus_per_node` is the number of training ranks per node: one per GPU, or one process per rank on CPU.
    `max_try_make_batch` bounds the generations of a step with `algorithm.online_filtering`.
    `val_only` validates the model and ends, without training workers; it needs no training data, and writes to
    `output_dir` with "-validation" behind its name, so that no run is touched.
    For the first `critic_warmup` steps only the critic trains, where there is one.
    `val_freq` counts steps, 0 validates only before and after. `samples_per_step` generations of each step go
    to samples.jsonl. `logger` lists trackers: console, jsonl, tensorboard, wandb, mlflow, swanlab, or a plugin's;
    those that can show pictures get `val_generations_to_log` responses of each validation, one per prompt, with the
    prompt's images as they are and under each view.

    A checkpoint is saved every `save_freq` steps and after the last (0: never); the newest `save_limit` are kept (0:
    all). `save_best` names a metric of validation, such as val/accuracy: a step with the highest so far is saved too,
    and kept. `save_model_only` leaves the optimizer out: such a checkpoint can be exported and not resumed.
    With `async_save` training goes on from a copy on the CPU while a checkpoint is written.
    `experiment_name` is by default the preset's name. A folder belongs to one process at a time and to one experiment:
    `resume` is `auto` (go on from the newest whole checkpoint in `output_dir`, where there is one, and refuse to if the
    model, the terms or the views are others), `never`, or the path of a checkpoint.

    SIGTERM and SIGINT save a checkpoint and end the run, exit code 0: after the step (`on_signal` finish_step) or at
    once (stop_now: a step whose updates have not begun is left, and done again later).
    """

    project_name: str = "papo"
    experiment_name: str | None = None
    output_dir: str = "outputs/${trainer.project_name}/${trainer.experiment_name}"
    total_epochs: int = 2
    max_steps: int | None = None
    seed: int = 1
    device: Device = Device.auto
    nnodes: int = 1
    cluster_timeout_s: float = 120.0
    n_gpus_per_node: int = 8
    max_try_make_batch: int = 20
    val_only: bool = False
    val_before_train: bool = True
    val_freq: int = 5
    val_after_train: bool = True
    critic_warmup: int = 0
    samples_per_step: int = 4
    val_generations_to_log: int = 4
    save_model: bool = True
    save_freq: int = 10
    save_limit: int = 2
    save_best: str | None = None
    save_model_only: bool = False
    async_save: bool = False
    resume: str = "auto"
    on_signal: OnSignal = OnSignal.finish_step
    logger: list[str] = field(default_factory=lambda: ["console", "jsonl"])

"""The whole config."""

from __future__ import annotations

from dataclasses import dataclass, field

from verl.config.algorithm import AlgorithmConfig
from verl.config.data import DataConfig
from verl.config.trainer import TrainerConfig
from verl.config.worker import WorkerConfig


@dataclass
class Config:
    data: DataConfig = field(default_factory=DataConfig)
    worker: WorkerConfig = field(default_factory=WorkerConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)

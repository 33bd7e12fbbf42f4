"""The whole config, and what its sections must agree on."""

from __future__ import annotations

from dataclasses import dataclass, field

from verl.config.algorithm import AlgorithmConfig, OldLogProbs, Truncation
from verl.config.data import DataConfig
from verl.config.trainer import TrainerConfig
from verl.config.worker import WorkerConfig


@dataclass
class Config:
    data: DataConfig = field(default_factory=DataConfig)
    worker: WorkerConfig = field(default_factory=WorkerConfig)
    algorithm: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)

    def check(self, key: str) -> None:
        """Raise ValueError naming the keys that do not fit together, and the way out."""
        data, trainer, rollout = self.data, self.trainer, self.worker.rollout
        if data.train_files is None and not trainer.val_only:
            raise ValueError("data.train_files is not set: it names what to train on (or set trainer.val_only=true)")
        if data.val_files is None and trainer.val_only:
            raise ValueError("data.val_files is not set, and trainer.val_only=true needs it")
        if data.val_files is None and (trainer.val_before_train or trainer.val_after_train or trainer.val_freq):
            raise ValueError(
                "data.val_files is not set: set it, or switch validation off with "
                "trainer.val_before_train=false trainer.val_after_train=false trainer.val_freq=0"
            )
        longest = data.max_prompt_length + data.max_response_length
        if rollout.max_model_len is not None and rollout.max_model_len < longest:
            raise ValueError(
                f"worker.rollout.max_model_len={rollout.max_model_len} is below data.max_prompt_length + "
                f"data.max_response_length = {longest}; raise it, or leave it out"
            )
        self._check_ahead()
        if self.algorithm.overlong_buffer > data.max_response_length:
            raise ValueError(
                f"algorithm.overlong_buffer={self.algorithm.overlong_buffer}: from 0 (off) to "
                f"data.max_response_length={data.max_response_length} tokens"
            )
        if data.mini_rollout_batch_size is not None and not self.algorithm.online_filtering:
            raise ValueError(
                f"data.mini_rollout_batch_size={data.mini_rollout_batch_size}: only with "
                "algorithm.online_filtering=true"
            )

    def _check_ahead(self) -> None:
        """One step ahead, responses come from weights that are a step older, and the loss must know."""
        if not self.trainer.ahead:
            return
        if self.algorithm.old_log_probs == OldLogProbs.rollout:
            raise ValueError(
                "trainer.ahead=1 with algorithm.old_log_probs=rollout: the ratio would be clipped around the engines' "
                "older policy; set algorithm.old_log_probs=auto"
            )
        for name, term in self.algorithm.terms.items():
            if term.coef and getattr(term, "tis", None) == Truncation.off:
                key = f"algorithm.terms.{name}.tis"
                raise ValueError(
                    f"trainer.ahead=1 with {key}=off: responses come from weights that are a step older, and nothing "
                    f"corrects for it; set {key}=token (or sequence)"
                )

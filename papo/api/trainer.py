"""PAPOTrainer: TRL's trainer as a thin shell. It makes a config and calls this framework's driver."""

from __future__ import annotations

import inspect
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, TrainerCallback
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.trainer_utils import TrainOutput

from papo.api.config import PAPOConfig
from papo.api.data import store
from papo.api.rewards import ANSWER, PROMPT, Part, own_function, save
from verl.checkpoint.folder import CheckpointFolder
from verl.config.compose import compose_config
from verl.config.config import Config
from verl.data.vision import load_processor
from verl.legacy.rule import Changes
from verl.trainer.plan import make_plan
from verl.trainer.ray_trainer import Listener, RayTrainer
from verl.utils.files import atomic_path, hold_folder
from verl.utils.interrupts import RunInterrupted

logger = logging.getLogger(__name__)

Rows = Dataset | Sequence[dict[str, Any]]
RewardFunc = Callable[..., Any] | str
INPUTS = "-inputs"  # behind the run's folder: datasets, reward functions, and a model that was given as an object

# TRL's names of what is logged, beside our own.
LOGGED = {
    "train/reward": "reward",
    "train/reward_std": "reward_std",
    "train/groups_without_signal": "frac_reward_zero_std",
    "actor/pg_loss": "loss",
    "actor/grad_norm": "grad_norm",
    "actor/lr": "learning_rate",
    "actor/entropy": "entropy",
    "actor/ref_kl": "kl",
    "rollout/response_length_mean": "completions/mean_length",
    "rollout/response_length_max": "completions/max_length",
    "rollout/truncated": "completions/clipped_ratio",
    "timing_s/step": "step_time",
}


class PAPOTrainer:
    """Trains a vision-language model with PAPO; the arguments are those of TRL 1.7.1's PAPOTrainer.

    Args:
        model: A folder, a name on the hub, or a model of transformers, which is saved first.
        reward_funcs: One or several: TRL's callables, closures too, sync or async, or "path/to/file.py:function", a
            reward function of this framework. They run in processes of their own, which are killed where they hang.
        args: PAPOConfig.
        train_dataset: Rows with `prompt`, text or messages, and `image` or `images` (PIL, bytes, paths), or without;
            every further column reaches the rewards.
        eval_dataset: The same; or several, by name.
        processing_class: The model's processor, for its limits of an image's pixels; by default the model's own.
        callbacks: transformers' TrainerCallbacks.
        peft_config: A peft LoraConfig.

    Raises:
        ValueError, FileNotFoundError: naming the argument, or the dataset and row, at fault.
    """

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: RewardFunc | list[RewardFunc],
        args: PAPOConfig | None = None,
        train_dataset: Rows | None = None,
        eval_dataset: Rows | Mapping[str, Rows] | None = None,
        processing_class: Any = None,
        reward_processing_classes: None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[None, None] = (None, None),
        peft_config: Any = None,
    ) -> None:
        if reward_processing_classes is not None or tuple(optimizers) != (None, None):
            raise ValueError(
                "reward_processing_classes and optimizers: rewards are functions here, and the optimizer is AdamW with "
                "the options of PAPOConfig"
            )
        self.args = args or PAPOConfig()
        name = model if isinstance(model, str) else model.config._name_or_path
        self.output_dir = self.args.folder(name or "model")
        self.model = model if isinstance(model, str) else self._saved(model, processing_class)
        self.train_dataset, self.eval_dataset = train_dataset, eval_dataset
        self.processing_class = processing_class or load_processor(self.model, bool(self.args.trust_remote_code))
        self.peft_config = peft_config
        self.rewards = parts_of(reward_funcs, self.args.reward_weights)
        self.state, self.control = TrainerState(), TrainerControl()
        self.callbacks: list[TrainerCallback] = []
        adapter_changes(peft_config)
        for callback in callbacks or []:
            self.add_callback(callback)
        self.call("on_init_end")

    def add_callback(self, callback: TrainerCallback | type[TrainerCallback]) -> None:
        self.callbacks.append(callback() if isinstance(callback, type) else callback)

    def call(self, event: str, **arguments: Any) -> None:
        """Call every callback's method `event`, as transformers does; models and loaders are not in this process."""
        for callback in self.callbacks:
            found = getattr(callback, event)(
                self.args,
                self.state,
                self.control,
                processing_class=self.processing_class,
                **dict.fromkeys(("model", "optimizer", "lr_scheduler", "train_dataloader", "eval_dataloader")),
                **arguments,
            )
            self.control = self.control if found is None else found

    def train(self, resume_from_checkpoint: bool | str | None = None) -> TrainOutput:
        """Train to the end, or on from where an earlier call or process was ended: by Ctrl-C, by a callback, by a kill.

        Args:
            resume_from_checkpoint: None or True: the newest checkpoint in output_dir, if there is one; a path: that
                one; False: train anew, and move aside what is there.

        Raises what the driver raises: RewardError with a reward function's own traceback, a callback's own error.
        """
        if self.train_dataset is None:
            raise ValueError("train_dataset is not given: there is nothing to train on")
        wanted = self.args.resume_from_checkpoint if resume_from_checkpoint is None else resume_from_checkpoint
        resume = {None: "auto", True: "auto", False: "never"}.get(wanted, wanted)
        with hold_folder(self.output_dir), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="'set_vital' is deprecated")  # torchdata calls it
            plan = make_plan(self._config({"trainer.resume": resume}))
            driver = RayTrainer(plan, Events(self, len(plan.train_loader.dataset) / plan.sizes.prompts_per_step))
            driver.open()
            self.state.max_steps = plan.total_steps
            self.control.should_training_stop = False
            self.call("on_train_begin")
            try:
                summary: Mapping[str, Any] = driver.fit()
                self.state.global_step = int(summary["steps"])
            except RunInterrupted as ended:
                logger.warning("%s", ended)
                summary = {"interrupted": str(ended)}
        self.call("on_train_end")
        losses = [entry["loss"] for entry in self.state.log_history if "loss" in entry]
        return TrainOutput(self.state.global_step, sum(losses) / max(len(losses), 1), dict(summary))

    def evaluate(self, eval_dataset: Rows | Mapping[str, Rows] | None = None) -> dict[str, float]:
        """Validate the model as it is now: `eval_reward`, and `eval_NAME` for each reward and whatever it logs; of
        several datasets `eval_DATASET/NAME` too."""
        if eval_dataset is not None:
            self.eval_dataset = eval_dataset
        if self.eval_dataset is None:
            raise ValueError("eval_dataset is not given: there is nothing to evaluate on")
        last = Last()
        with TemporaryDirectory() as scratch, warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="'set_vital' is deprecated")
            model = self._current_model(scratch) or self.model
            only = {"trainer.val_only": True, "worker.actor.model.model_path": model}
            plan = make_plan(self._config(only | {"worker.actor.model.lora.rank": 0}))  # what was trained is merged
            with hold_folder(plan.config.trainer.output_dir):
                driver = RayTrainer(plan, last)
                driver.open()
                driver.fit()
        metrics = {name.replace("val/", "eval_", 1): value for name, value in last.metrics.items()}
        self.call("on_evaluate", metrics=metrics)
        self.state.log_history.append({"step": self.state.global_step, **metrics})
        return metrics

    def save_model(self, output_dir: str | None = None) -> None:
        """Write the model as it is now as a Hugging Face folder, adapters merged. None: into the run's folder,
        where train() leaves it anyway.

        Raises ValueError where nothing has been trained.
        """
        path = os.path.abspath(output_dir or self._trained)
        with TemporaryDirectory() as scratch:
            model = self._current_model(scratch)
            if model is None:
                raise ValueError(f"{self.output_dir} has no trained model and no checkpoint: call train() first")
            if os.path.isdir(path) and model != path:  # such as the run's folder, whose files stay
                shutil.copytree(model, path, dirs_exist_ok=True)
            elif model != path:
                with atomic_path(path) as temporary:
                    shutil.copytree(model, temporary)

    def push_to_hub(self, repo: str | None = None) -> None:
        """Upload the model as it is now, to a repository that is private if it is new; by default hub_model_id."""
        from papo.tools.export.model import upload

        with TemporaryDirectory() as folder:
            self.save_model(path := os.path.join(folder, "model"))
            upload(path, repo or self.args.hub_model_id or os.path.basename(self.output_dir))

    def to_preset(self) -> str:
        """The whole run as a Hydra preset: a file for `--config-dir`, with which the trainer's command, given the
        overrides in its comments, does what `train()` does."""
        return self.args.to_preset(self._changes())

    @property
    def _trained(self) -> str:
        return os.path.join(self.output_dir, "model")

    def _current_model(self, scratch: str) -> str | None:
        """The folder of the trained model: the run's, or, before its end, the newest checkpoint's, written to
        `scratch`. None where there is neither."""
        checkpoints = CheckpointFolder(os.path.join(self.output_dir, "checkpoints"))
        if os.path.isfile(os.path.join(self.output_dir, "summary.json")) and os.path.isdir(self._trained):
            return self._trained
        if checkpoints.latest() is None:
            return None
        from papo.tools.export.command import write
        from papo.tools.export.source import find_source

        source, folder = find_source(self.output_dir), os.path.join(scratch, "model")
        write(source, folder, "fp32", source.has_adapter, os.path.basename(self.output_dir))
        return folder

    def _saved(self, model: PreTrainedModel, processor: Any) -> str:
        """The folder of a model that was given as an object."""
        folder = f"{self.output_dir}{INPUTS}/model"
        processor = processor or load_processor(model.config._name_or_path)
        with atomic_path(folder) as temporary:
            model.save_pretrained(temporary)
            processor.save_pretrained(temporary)
        return folder

    def _changes(self) -> Changes:
        """The trainer's arguments as keys."""
        inputs, folder = f"{self.output_dir}{INPUTS}", self.output_dir
        os.makedirs(inputs, exist_ok=True)
        functions = os.path.join(inputs, "rewards.pkl")
        save(self.rewards, functions)
        changes: Changes = {
            "worker.actor.model.model_path": self.model,
            "worker.reward.reward_function": f"{Path(__file__).with_name('rewards.py')}:score",
            "worker.reward.reward_function_kwargs": {"functions": functions},
            "trainer.output_dir": folder,
            "trainer.experiment_name": self.args.run_name or os.path.basename(folder),
            "data.prompt_key": PROMPT,
            "data.answer_key": ANSWER,
            **pixel_limits(self.processing_class),
            **adapter_changes(self.peft_config),
        }
        columns: set[str | None] = set()
        if self.train_dataset is not None:
            changes["data.train_files"], column = store(self.train_dataset, f"{inputs}/train", "train_dataset")
            columns.add(column)
        if self.eval_dataset is not None:
            several = self.eval_dataset if isinstance(self.eval_dataset, Mapping) else {"eval": self.eval_dataset}
            stored = [store(rows, f"{inputs}/{name}", f"eval_dataset {name}") for name, rows in several.items()]
            changes["data.val_files"] = ",".join(path for path, _ in stored)
            columns |= {column for _, column in stored}
        if len(columns - {None}) > 1:
            raise ValueError("train_dataset and eval_dataset name their pictures differently (image, images)")
        if named := columns - {None}:
            changes["data.image_key"] = named.pop()
        return changes

    def _config(self, more: Changes) -> Config:
        """The config of the run, with `more` keys. It is composed of a preset, as on a command line."""
        preset = self.args.preset(self._changes() | more)
        with TemporaryDirectory() as folder:
            Path(folder, "api.yaml").write_text(preset.to_yaml(), encoding="utf-8")
            return compose_config("api", self.args.overrides, folder)


class Events(Listener):
    """Turns the driver's events into transformers' callbacks and the trainer's state."""

    def __init__(self, trainer: PAPOTrainer, steps_per_epoch: float) -> None:
        self.trainer = trainer
        self.steps_per_epoch = steps_per_epoch

    def begin(self, step: int, total: int) -> None:
        self.trainer.state.global_step, self.trainer.state.max_steps = step, total
        self.trainer.call("on_step_begin")

    def done(self, step: int, metrics: dict[str, float], saved: bool) -> bool:
        trainer, args, state = self.trainer, self.trainer.args, self.trainer.state
        state.global_step, state.epoch = step, step / self.steps_per_epoch
        where = {"epoch": state.epoch, "step": step}
        validated = {name: value for name, value in metrics.items() if name.startswith("val/")}
        if step:
            trainer.call("on_step_end")
            if step % args.logging_steps == 0 or step == state.max_steps or (step == 1 and args.logging_first_step):
                names = [part.name for part in trainer.rewards]
                logs = in_trl_words({n: v for n, v in metrics.items() if n not in validated}, names) | where
                state.log_history.append(logs)
                trainer.call("on_log", logs=logs)
        if validated:
            found = {name.replace("val/", "eval_", 1): value for name, value in validated.items()} | where
            state.log_history.append(found)
            trainer.call("on_evaluate", metrics=found)
        if saved:
            trainer.call("on_save")
        if step and step < state.max_steps:
            trainer.call("on_step_begin")
        return trainer.control.should_training_stop


class Last(Listener):
    """Keeps the last metrics."""

    metrics: dict[str, float]

    def done(self, step: int, metrics: dict[str, float], saved: bool) -> bool:
        self.metrics = metrics
        return False


def in_trl_words(metrics: dict[str, float], rewards: list[str]) -> dict[str, float]:
    """The metrics under our names, and under TRL's where it has one."""
    names = LOGGED | {f"train/{name}": f"rewards/{name}/mean" for name in rewards}
    return metrics | {names[name]: value for name, value in metrics.items() if name in names}


def parts_of(functions: RewardFunc | list[RewardFunc], weights: list[float] | None) -> list[Part]:
    """reward_funcs with their names and weights. Raises ValueError naming the one at fault."""
    functions = functions if isinstance(functions, list) else [functions]
    weights = [1.0] * len(functions) if weights is None else list(weights)
    if not functions or len(weights) != len(functions):
        raise ValueError(f"reward_weights has {len(weights)} weights for {len(functions)} reward_funcs")
    parts: list[Part] = []
    for function, weight in zip(functions, weights, strict=True):
        if isinstance(function, str):
            path, _, name = function.rpartition(":")
            function = f"{os.path.abspath(path)}:{name}" if path else function
            own_function(function)
        elif inspect.isclass(function) or not callable(function) or hasattr(function, "forward"):
            raise ValueError(f"reward_funcs: {function!r} is no function; a reward model is called inside one of yours")
        else:
            name = getattr(function, "__name__", type(function).__name__)
        names = [part.name for part in parts]
        parts.append(Part(f"{name}_{len(parts)}" if name in names else name, function, float(weight)))
    return parts


def pixel_limits(processor: Any) -> Changes:
    """The least and largest area of an image, from its processor."""
    size = getattr(getattr(processor, "image_processor", None), "size", None)
    if not size or "longest_edge" not in size:
        return {}
    return {"data.min_pixels": size["shortest_edge"], "data.max_pixels": size["longest_edge"]}


def adapter_changes(config: Any) -> Changes:
    """A peft LoraConfig as keys. Raises ValueError for an adapter of another kind, and for dropout."""
    if config is None:
        return {}
    if type(config).__name__ != "LoraConfig":
        raise ValueError(f"peft_config is a {type(config).__name__}: a LoraConfig is known")
    plain = {"lora_dropout": 0.0, "use_dora": False, "use_rslora": False, "modules_to_save": None, "bias": "none"}
    for name, value in plain.items():
        if getattr(config, name, value) != value:
            raise ValueError(f"peft_config has {name}={getattr(config, name)!r}: {value!r} is known here")
    targets = config.target_modules or ["q_proj", "v_proj"]  # peft's own default for these models
    return {
        "worker.actor.model.lora.rank": config.r,
        "worker.actor.model.lora.alpha": int(config.lora_alpha),
        "worker.actor.model.lora.target_modules": targets if isinstance(targets, str) else sorted(targets),
    }

"""README.md of an exported model: what was trained, how, and what validation said."""

from __future__ import annotations

import json
import os
from importlib.metadata import version
from typing import Any

from papo.tools.export.source import Source

# Beside terms and views: what another person needs to do it again.
KEYS = (
    "algorithm.adv_estimator",
    "algorithm.online_filtering",
    "data.train_files",
    "data.rollout_batch_size",
    "data.max_prompt_length",
    "data.max_response_length",
    "data.min_pixels",
    "data.max_pixels",
    "data.format_prompt",
    "worker.rollout.n",
    "worker.rollout.temperature",
    "worker.rollout.top_p",
    "worker.actor.global_batch_size",
    "worker.actor.ppo_epochs",
    "worker.actor.loss_avg_mode",
    "worker.actor.model.freeze_vision_tower",
    "worker.actor.model.lora.rank",
    "worker.actor.model.lora.alpha",
    "worker.actor.optim.strategy",
    "worker.actor.optim.lr",
    "worker.actor.optim.weight_decay",
    "worker.reward.reward_function",
    "trainer.seed",
)
COEF = "coef"

USE = """\
```python
from transformers import {auto}, {processor}

model = {auto}.from_pretrained("{name}")
processor = {processor}.from_pretrained("{name}")
```
"""

USE_ADAPTER = """\
```python
from peft import PeftModel
from transformers import {auto}

model = PeftModel.from_pretrained({auto}.from_pretrained("{base}"), "{name}")
```
"""


def model_card(source: Source, name: str, dtype: str, adapter: bool = False) -> str:
    """The text of README.md for the export called `name`; what nobody kept is left out. `adapter`: it is one alone."""
    with open(os.path.join(source.huggingface, "config.json"), encoding="utf-8") as file:
        has_vision = "vision_config" in json.load(file)
    config, base = source.config, _base_model(source.config)
    step = f" after step {source.step}" if source.step is not None else ""
    of = f" of {base}" if base else ""
    origin = "Merged from the shards of a checkpoint of EasyR1." if source.easyr1 else "Trained with PAPO-RL."
    what = "adapter (LoRA)" if adapter else "policy"
    parts = [
        _header(config, base, has_vision, "peft" if adapter else "transformers"),
        f"# {name}\n",
        f"The {what}{of}{step} of reinforcement learning with a rule-based reward. {origin} Weights are {dtype}.\n",
        (USE_ADAPTER if adapter else USE).format(
            auto="AutoModelForImageTextToText" if has_vision else "AutoModelForCausalLM",
            processor="AutoProcessor" if has_vision else "AutoTokenizer",
            name=name,
            base=base,
        ),
    ]
    if config:
        parts += [_terms(config), _settings(config)]
    if source.metrics:
        parts.append(_metrics(source.metrics))
    packages = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers"))
    return "\n".join([*parts, f"Exported with {packages}.\n"])


def _header(config: dict[str, Any], base: str, has_vision: bool, library: str) -> str:
    """The header that the hub reads. A model from a folder has no name there."""
    tags = ["reinforcement-learning", *([config["algorithm"]["adv_estimator"]] if config else [])]
    if "perception_kl" in (config.get("algorithm", {}).get("terms") or {}):
        tags.append("papo")
    lines = ["---", f"library_name: {library}"]
    lines.append(f"pipeline_tag: {'image-text-to-text' if has_vision else 'text-generation'}")
    lines += [f"base_model: {base}"] if base.count("/") == 1 else []
    return "\n".join([*lines, "tags:", *(f"- {tag}" for tag in tags), "---", ""])


def _base_model(config: dict[str, Any]) -> str:
    path = _get(config, "worker.actor.model.model_path") or ""
    return path if path.count("/") == 1 and not os.path.exists(path) else os.path.basename(path.rstrip("/"))


def _terms(config: dict[str, Any]) -> str:
    """The objective, and the views that its terms look at."""
    rows = []
    for name, term in config["algorithm"]["terms"].items():
        schedule = term.get("schedule") or {}
        options = {k: v for k, v in term.items() if k not in ("kind", COEF, "schedule") and v not in (None, "")}
        options |= {f"schedule.{k}": v for k, v in schedule.items() if v is not None}
        rows.append(f"| `{name}` | {term['kind']} | {_short(term[COEF])} | {_pairs(options)} |")
    table = "\n".join(["| term | kind | coefficient | options |", "|---|---|---|---|", *rows])
    views = [f"- `{name}`: {_pairs(view)}" for name, view in (config["algorithm"].get("views") or {}).items()]
    text = f"## Objective, minimised\n\n{table}\n"
    return f"{text}\nViews of the images:\n\n" + "\n".join(views) + "\n" if views else text


def _settings(config: dict[str, Any]) -> str:
    rows = [f"| `{key}` | {_short(_get(config, key))} |" for key in KEYS if _get(config, key) is not None]
    return "\n".join(["## Settings", "", "| key | value |", "|---|---|", *rows, ""])


def _metrics(lines: list[dict[str, Any]]) -> str:
    """The first validation beside the last."""
    measured = [line for line in lines if any(name.startswith("val/") for name in line)]
    if not measured:
        return "## Validation\n\nThere was none up to this step.\n"
    first, last = measured[0], measured[-1]
    names = sorted(name for name in last if name.startswith("val/") and last[name] is not None)
    if first is last:
        table = ["| metric | step {} |".format(last["step"]), "|---|---|"]
        table += [f"| `{name}` | {_short(last[name])} |" for name in names]
    else:
        table = [f"| metric | step {first['step']} | step {last['step']} |", "|---|---|---|"]
        table += [f"| `{name}` | {_short(first.get(name))} | {_short(last[name])} |" for name in names]
    return "\n".join(["## Validation", "", *table, ""])


def _get(config: dict[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _pairs(options: dict[str, Any]) -> str:
    return ", ".join(f"{name}={_short(value)}" for name, value in options.items() if value is not None)


def _short(value: Any) -> str:
    """A setting as the table shows it; of a local path only its last part."""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, str) and value.startswith(("/", "~")):
        return os.path.basename(value.rstrip("/"))
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_short, value))
    return str(value).lower() if isinstance(value, bool) else str(value)

"""Old command lines and YAML files, EasyR1's and PAPO's: translated by one table into a preset, each key said once."""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from typing import Any, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from verl.config.compose import compose_config
from verl.config.config import Config
from verl.legacy.rule import Changes, Old, Rule, refusal
from verl.legacy.table import RULES
from verl.plugins import load_plugins

logger = logging.getLogger(__name__)

MARK = "config="  # config=FILE.yaml, EasyR1's way to name a config
PRESET = "converted"


@dataclass
class Preset:
    """A preset in the making: the terms and views that it lists, and its values by key."""

    options: dict[str, str] = field(default_factory=dict)
    values: Changes = field(default_factory=dict)

    def take(self, changes: Changes) -> None:
        for key, value in changes.items():
            (self.options if key.startswith("/") else self.values)[key] = value

    def to_yaml(self) -> str:
        """The file, as it may lie in configs/; values that are defaults of the dataclasses are left out."""
        ours = OmegaConf.structured(Config)
        preset = OmegaConf.create({"defaults": ["schema", *({k: v} for k, v in self.options.items()), "_self_"]})
        for key, value in self.values.items():
            if value != OmegaConf.select(ours, key):
                OmegaConf.update(preset, key, value, force_add=True)
        return OmegaConf.to_yaml(preset)


def compose_legacy(path: str, overrides: Sequence[str] = ()) -> Config:
    """The config of an old YAML file and overrides, which may be old keys, keys of this framework, or Hydra's own.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: an old key has no meaning here, a key is unknown, or the result does not compose.
    """
    preset, rest = translate(path, overrides)
    with tempfile.TemporaryDirectory() as folder:
        with open(os.path.join(folder, f"{PRESET}.yaml"), "w", encoding="utf-8") as file:
            file.write(preset.to_yaml())
        return compose_config(PRESET, rest, folder)


def translate(path: str, overrides: Sequence[str] = ()) -> tuple[Preset, list[str]]:
    """The preset that says what an old file and overrides say, and the overrides that only Hydra understands.

    What neither sets has upstream's default. Raises as `compose_legacy`.
    """
    load_plugins()  # they add rows to the table
    rest = [word for word in overrides if _is_hydras(word)]
    raw = _read(path)
    try:
        raw = OmegaConf.merge(raw, OmegaConf.from_dotlist([word for word in overrides if word not in rest]))
    except (OmegaConfBaseException, YAMLError) as error:
        raise ValueError(f"the overrides {list(overrides)} of {path} are no key=value: {error}") from error
    given = _flatten(OmegaConf.to_container(raw))
    preset = Preset()
    old = {key: default for rule in RULES for key, default in rule.defaults.items()} | given
    silent: Changes = {}
    for rule in RULES:
        changes = _apply(rule, old)
        if line := rule.differs(old):
            logger.warning("not as in EasyR1 and PAPO: %s", line)
        preset.take(changes)
        said = {key: given.pop(key) for key in rule.defaults if key in given}
        if said:
            _log(rule, said, changes)
        else:
            silent |= changes
    for key in given:
        if not is_ours(key):
            raise ValueError(f"{path} with {list(overrides)}: '{key}' is no key of EasyR1, of PAPO or of this version")
    preset.take(given)
    ours = OmegaConf.structured(Config)
    filled = {k: v for k, v in silent.items() if not k.startswith("/") and v != OmegaConf.select(ours, k)}
    if filled:
        logger.info("%s does not set, so EasyR1's and PAPO's defaults hold: %s", path, _pairs(filled))
    return preset, rest


def translate_overrides(overrides: Sequence[str]) -> list[str]:
    """Overrides of a preset, where old keys among them that are one key here are replaced by it.

    Raises:
        ValueError: an old key has no meaning here, or none without the whole old config.
    """
    load_plugins()
    given = dict(word.split("=", 1) for word in overrides if "=" in word)
    return [new for word in overrides for new in _translate_override(word, given)]


def _translate_override(word: str, given: Mapping[str, str]) -> list[str]:
    """The override that one is here; of several that are one key here, the last is."""
    key, _, text = word.partition("=")
    if _is_hydras(word) or is_ours(key):
        return [word]
    for rule in RULES:
        if key in rule.plain:
            logger.info("%s -> %s", word, f"{rule.plain[key]}={text}")
            return [f"{rule.plain[key]}={text}"]
        if not any(key == old or key.startswith(f"{old}.") for old in rule.defaults):
            continue
        if key not in rule.defaults or (len(rule.defaults) > 1 and not rule.alone):
            raise refusal(
                key,
                text,
                "alone it does not say which loss terms and views there are. Begin with a preset that has them "
                "(--config-name), or give the whole old config with config=FILE.yaml",
            )
        said = {old: _value(text) for old, text in given.items() if old in rule.defaults}
        if key != [*said][-1]:
            return []
        changes = _apply(rule, rule.defaults | said)
        _log(rule, said, changes)
        return [f"{new}={json.dumps(value)}" for new, value in changes.items()]
    return [word]


def _value(text: str) -> Any:
    return OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))["value"]


def is_ours(key: str) -> bool:
    """Whether `key` names a field of Config, or an entry of a table in it."""
    kind: Any = Config
    for part in key.split("."):
        if not is_dataclass(kind):
            return get_origin(kind) is dict
        kind = get_type_hints(kind).get(part)
    return kind is not None


def _is_hydras(word: str) -> bool:
    return word[:1] in "+~" or "@" in word.partition("=")[0]


def _read(path: str) -> DictConfig:
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{MARK}{path}: there is no file '{os.path.abspath(path)}'")
    try:
        raw = OmegaConf.load(path)
    except (YAMLError, OmegaConfBaseException) as error:
        raise ValueError(f"{MARK}{path} is no YAML: {error}") from error
    if not isinstance(raw, DictConfig):
        raise ValueError(f"{MARK}{path} is no mapping of sections (data, algorithm, worker, trainer)")
    if "defaults" in raw:
        raise ValueError(f"{MARK}{path} is a preset of this framework: use --config-dir and --config-name")
    return raw


def _flatten(node: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Leaves by their full key; what the table has as a dict is a leaf."""
    tables = {key for rule in RULES for key, default in rule.defaults.items() if isinstance(default, dict)}
    leaves: dict[str, Any] = {}
    for name, value in node.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping) and key not in tables:
            leaves |= _flatten(value, f"{key}.")
        else:
            leaves[key] = value
    return leaves


def _apply(rule: Rule, old: Old) -> Changes:
    try:
        return rule.apply(old)
    except (TypeError, AttributeError, ArithmeticError) as error:  # a text where a number belongs, and the like
        raise ValueError(f"{_pairs({key: old[key] for key in rule.defaults})}: {error}") from error


def _log(rule: Rule, said: dict[str, Any], changes: Changes) -> None:
    if not changes:
        logger.info("%s: %s", _pairs(said), rule.why)
    elif said != changes:
        logger.info("%s -> %s", _pairs(said), _pairs(changes))


def _pairs(values: Mapping[str, Any]) -> str:
    texts = {
        key.removeprefix("/"): value if isinstance(value, str) else json.dumps(value) for key, value in values.items()
    }
    return ", ".join(f"{key}={text}" for key, text in texts.items())

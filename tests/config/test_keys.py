"""Every key has its documentation and bounds beside it, and the page that is made from them is current."""

from __future__ import annotations

from dataclasses import fields, is_dataclass

import pytest

from tests.conftest import REPOSITORY
from verl.config.config import Config
from verl.config.keys import as_markdown, as_text, reference
from verl.config.option import check_options, option
from verl.config.store import GROUPS

CONTAINERS = {"terms", "views", "shapers", "extra", "kind"}  # filled from groups, or their names


def classes(config_class: type) -> list[type]:
    made = config_class() if config_class is Config else None
    found = [config_class]
    for one in fields(config_class):
        value = getattr(made, one.name) if made else one.default_factory() if callable(one.default_factory) else None
        found += classes(type(value)) if is_dataclass(value) else []
    return found


def test_every_key_is_documented():
    options = [cls for group in GROUPS.values() for cls in group.values()]
    for config_class in {*classes(Config), *options}:
        for one in fields(config_class):
            inner = callable(one.default_factory) and is_dataclass(one.default_factory())
            assert inner or one.name in CONTAINERS or one.metadata.get("doc"), f"{config_class.__name__}.{one.name}"


def test_the_page_is_what_the_command_makes(monkeypatch):
    """If this fails: papo keys --markdown > configs/KEYS.md"""
    for group, options in GROUPS.items():  # without those of plugins that other tests have loaded
        own = {name: cls for name, cls in options.items() if cls.__module__.startswith(("verl.", "papo."))}
        monkeypatch.setitem(GROUPS, group, own)
    assert (REPOSITORY / "configs/KEYS.md").read_text() == as_markdown(reference())


def test_the_reference_of_a_part(monkeypatch):
    found = {key.key: key for key in reference("worker.rollout")}
    assert found["worker.rollout.top_p"].values == "number, a value above 0 and at most 1"
    assert found["worker.rollout.seed"].default == "${trainer.seed}" and "data.seed" not in found
    monkeypatch.setenv("COLUMNS", "120")
    text = as_text(reference("algorithm.terms.NAME.estimator"))
    assert "algorithm.terms.NAME.estimator = k3  [term: perception_kl]" in text and "k1, k2, k3, full" in text


@pytest.mark.parametrize(
    ("bounds", "good", "bad", "words"),
    [
        ({"above": 0}, [0.1, 9], [0, -1], "a value above 0"),
        ({"least": 0, "most": 1}, [0, 1], [-0.1, 1.1], "a value from 0 to 1"),
        ({"least": 0, "below": 1}, [0], [1], "a value from 0 to below 1"),
        ({"above": 0, "most": 1}, [1], [0], "a value above 0 and at most 1"),
        ({}, [-9.0], [float("nan"), float("inf")], "a finite number"),
    ],
)
def test_bounds(bounds, good, bad, words):
    from dataclasses import make_dataclass

    made = make_dataclass("Made", [("x", float, option(0.5, "a number", **bounds))])
    for value in good:
        check_options(made(value), "key")
    for value in bad:
        with pytest.raises(ValueError, match=f"key.x={value}: {words} is needed"):
            check_options(made(value), "key")
    with pytest.raises(TypeError, match="unknown bounds"):
        option(1, "a number", atmost=3)

"""Telling a mistyped folder from a hub name."""

from __future__ import annotations

import os


def check_model_path(model_path: str) -> None:
    """Raise FileNotFoundError for what is meant as a folder and is none, before a hub is asked for it."""
    looks_local = model_path.startswith(("/", ".", "~")) or model_path.count("/") > 1
    if looks_local and not os.path.isfile(os.path.join(model_path, "config.json")):
        raise FileNotFoundError(
            f"worker.actor.model.model_path='{os.path.abspath(model_path)}' is no Hugging Face folder: "
            "it has no config.json"
        )

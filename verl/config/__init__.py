"""Typed configuration: dataclasses hold every default, presets in configs/ hold only what differs."""

"""A distributed reinforcement-learning framework for vision-language models."""

__version__ = "0.1.0"

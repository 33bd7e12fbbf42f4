"""Checkpoints on disk: whole or not there at all, checked before anything is loaded, and never a way to run code."""

"""Metrics that cannot be averaged wrongly."""

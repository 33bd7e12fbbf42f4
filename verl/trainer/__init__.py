"""The driver: it holds no model, only the order of things."""

"""The Python API, in the shape of TRL's PAPOTrainer: `from papo import PAPOTrainer, PAPOConfig`."""

"""Configs, command lines and checkpoints of EasyR1 and PAPO, read as this project's own."""

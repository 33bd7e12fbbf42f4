"""PAPO, Perception-Aware Policy Optimization (arXiv 2507.06448), as a plugin of verl."""

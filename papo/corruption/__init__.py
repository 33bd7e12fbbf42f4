"""Ways to take information out of an image while its size stays."""

"""`papo doctor`: says before a run what will not work, and the way out."""

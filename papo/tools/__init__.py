"""Commands around a run: what `papo NAME` does."""

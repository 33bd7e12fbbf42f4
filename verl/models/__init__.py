"""Models: loading, what differs between families, and log-probs without whole logits."""

"""Loss terms (pure functions that never reduce) and the one place that reduces and adds them."""

from verl.algorithms.losses import entropy, policy, ref_kl, sft  # noqa: F401  (they register themselves)

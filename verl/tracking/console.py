"""One readable line per step, above the progress bar."""

from __future__ import annotations

from tqdm import tqdm

from verl.tracking.registry import TRACKERS, Tracker

# (metric, label, format): what a person watches; everything else is in metrics.jsonl.
COLUMNS = (
    ("train/reward", "reward", "{:.3f}"),
    ("train/accuracy", "acc", "{:.3f}"),
    ("val/accuracy", "VAL", "{:.3f}"),
    ("actor/pg_loss", "pg", "{:+.4f}"),
    ("actor/perception_kl", "perc_kl", "{:.4f}"),
    ("actor/entropy", "ent", "{:.3f}"),
    ("actor/masked_entropy", "ent_masked", "{:.3f}"),
    ("actor/ref_kl", "ref_kl", "{:.4f}"),
    ("actor/grad_norm", "grad", "{:.2f}"),
    ("rollout/response_length_mean", "len", "{:.0f}"),
    ("rollout/log_prob_diff_max", "engine_diff", "{:.0e}"),
    ("timing_s/step", "s", "{:.1f}"),
)


@TRACKERS.register("console")
class ConsoleTracker(Tracker):
    """Prints through tqdm, which keeps the bar below the text."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        parts = [f"{label} {form.format(metrics[name])}" for name, label, form in COLUMNS if name in metrics]
        tqdm.write(f"step {step:>4}  " + "  ".join(parts))

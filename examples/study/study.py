"""Does a perception loss make a model look? GRPO, PAPO and others on digits with a shortcut, over seeds.

    python examples/study/study.py              # the whole study; finished runs are kept, so it can be interrupted
    python examples/study/study.py --followers  # the methods that followed PAPO, three seeds
    python examples/study/study.py --choose     # the runs on other seeds by which the coefficients were chosen
    python examples/study/study.py --choose-followers  # and those of the methods that followed
    python examples/study/study.py --demo       # one seed of GRPO and PAPO: minutes

Makes data and models under outputs/, trains two runs at a time, each on half of the cores, and writes results.json,
tables.md and the figures beside this file (with --choose and --demo: into outputs/study).
"""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (the backend is chosen first)

from papo.evaluation.statistics import percent  # noqa: E402
from papo.tools.compare import Comparison, Variant  # noqa: E402
from verl.utils.files import atomic_path  # noqa: E402

HERE = Path(__file__).resolve().parent
OUT = HERE.parents[1] / "outputs/study"
logger = logging.getLogger("study")

COMMON = ("trainer.n_gpus_per_node=1", "trainer.max_steps=100")
TERMS = "algorithm.terms"
ENTROPY = f"{TERMS}.entropy.coef=0.03"


def papo(gamma: float, *more: str) -> tuple[str, ...]:
    """Overrides of a PAPO preset: the perception KL's coefficient, and one of 0.03 for both entropies."""
    return (f"{TERMS}.perception_kl.coef={gamma}", ENTROPY, f"{TERMS}.masked_entropy.coef=0.03", *more)


def live(gamma: float, entropies: str) -> tuple[str, ...]:
    """The same with a live view and a detached perception KL."""
    return papo(
        gamma,
        f"{TERMS}.perception_kl.detach=true",
        f"{TERMS}.entropy.estimator={entropies}",
        f"{TERMS}.masked_entropy.estimator={entropies}",
    )


CHOSEN = 0.11  # the largest of --choose without a collapse
GRPO = Variant("GRPO", "grpo")
CONTROL = Variant("GRPO + entropy term", "grpo", (ENTROPY,))
PAPO = Variant(f"PAPO γ={CHOSEN}", "papo_grpo", papo(CHOSEN))
MISLED = (
    GRPO,
    CONTROL,
    Variant("PAPO γ=0.04", "papo_grpo", papo(0.04)),
    PAPO,
    Variant("PAPO γ=0.15", "papo_grpo", papo(0.15)),
    Variant(
        "PAPO live, γ=η=0.04",
        "papo_grpo_live",
        papo(0.04, ENTROPY.replace("0.03", "0.04"), f"{TERMS}.masked_entropy.coef=0.04"),
    ),
    Variant("PAPO live, KL detached, exact entropies", "papo_grpo_live", live(CHOSEN, "full")),
    Variant("PAPO live, KL detached, sampled entropies", "papo_grpo_live", live(CHOSEN, "sampled")),
    Variant("DAPO", "dapo"),
    Variant("PAPO-D", "papo_dapo", papo(CHOSEN)),
    Variant("VPPO", "vppo"),
)
SETTINGS = {"misled": MISLED, "mild": (GRPO, CONTROL, PAPO)}
SEEDS = (1, 2, 3, 4, 5)
CHOOSE = tuple(
    Variant(f"γ={gamma} η={eta}", "papo_grpo", (f"{TERMS}.perception_kl.coef={gamma}", f"{TERMS}.entropy.coef={eta}"))
    for gamma, eta in ((0.08, 0.0), (0.08, 0.03), (0.11, 0.03), (0.15, 0.0), (0.15, 0.03))
)
CHOOSE_SEEDS = (101, 102, 103)

SHAPERS, VIEWS = "algorithm.shapers", "algorithm.views"
HALF = "trainer.max_steps=50"  # to choose between settings of what rests on DAPO, whose steps are longer


def dvrp(coef: float) -> tuple[str, ...]:
    """The coefficient of both of DVRP's divergences, with PAPO's of the entropies."""
    return (f"{TERMS}.perception_kl.coef={coef}", f"{TERMS}.agreement.coef={coef}")


def noise(std: float) -> tuple[str, ...]:
    return (f"{VIEWS}.noised.std={std}",)


def banded(eta: float) -> tuple[str, ...]:
    """The coefficient of both entropies in their band."""
    return (f"{TERMS}.entropy.coef={eta}", f"{TERMS}.masked_entropy.coef={eta}")


# Of each method that followed PAPO two settings, to choose from.
FOLLOWER_CHOICES = (
    *(Variant(f"DVRP {coef}", "dvrp", dvrp(coef)) for coef in (0.04, 0.11)),
    *(Variant(f"NoisyRollout σ={std}", "noisy_rollout", noise(std)) for std in (0.4, 0.8)),
    *(Variant(f"PAPO + NoisyRollout σ={std}", "papo_noisy_rollout", papo(CHOSEN, *noise(std))) for std in (0.4, 0.8)),
    *(Variant(f"banded η={eta}", "papo_banded", banded(eta)) for eta in (0.03, 0.003)),
    *(Variant(f"PGPO boost={boost}", "pgpo", (f"{SHAPERS}.pgpo.boost={boost}", HALF)) for boost in (2.0, 5.0)),
    *(Variant(f"ToR {share}", "tor", (f"{SHAPERS}.tor.top_fraction={share}", HALF)) for share in (0.3, 0.6)),
    *(Variant(f"VEPO {share}", "vepo", (f"{SHAPERS}.vepo.top_fraction={share}", HALF)) for share in (0.2, 0.5)),
)
FOLLOWER_CHOICE_SEEDS = CHOOSE_SEEDS[:1]
FOLLOWERS = (
    GRPO,
    Variant("DAPO", "dapo"),
    Variant("DVRP", "dvrp", dvrp(0.04)),
    Variant("NoisyRollout", "noisy_rollout", noise(0.4)),
    Variant("PAPO + NoisyRollout", "papo_noisy_rollout", papo(CHOSEN, *noise(0.8))),
    Variant("PAPO banded", "papo_banded", banded(0.003)),
    Variant("PGPO", "pgpo"),  # these three with their presets' settings
    Variant("ToR", "tor"),
    Variant("VEPO", "vepo"),
)
FOLLOWER_SEEDS = SEEDS[:3]

# Columns of the tables: metric and heading.
SLICES = {
    "val/no_hint/accuracy": "no hint",
    "val/hint_right/accuracy": "right hint",
    "val/hint_wrong/accuracy": "wrong hint",
    "val/hint_wrong/copied": "wrong hint copied",
    "val/blank_hint_right/accuracy": "blank image, right hint",
}
RIGHT, COPIED = "val/hint_wrong/accuracy", "val/hint_wrong/copied"


def run(task: str, variants: tuple[Variant, ...], seeds: tuple[int, ...], jobs: int) -> list[dict[str, Any]]:
    """Make the task's inputs, train what is missing, and return a row per variant."""
    make = [sys.executable, "-m", "papo.quickstart", f"outputs/{task}_assets", "--task", task]
    subprocess.run(make, check=True, cwd=HERE.parents[1])
    comparison = Comparison(variants, seeds, task, OUT / task, COMMON, jobs)
    comparison.train()
    return comparison.evaluate((*SLICES, "train/accuracy"))


def table(rows: list[dict[str, Any]], differences: bool) -> str:
    """Every slice of every variant in percent: means, or paired differences to the first variant, with intervals."""
    key, interval, sign = ("difference", "difference_interval", "+") if differences else ("mean", "interval", "")
    shown = rows[1:] if differences else rows
    lines = [f"| | {' | '.join(SLICES.values())} | seconds a step |", "|---" * (len(SLICES) + 2) + "|"]
    for row in shown:
        cells = [percent(row[metric][key], row[metric][interval], sign) for metric in SLICES]
        lines.append(f"| {row['variant']} | {' | '.join(cells)} | {row['step_seconds']:.2f} |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path, title: str) -> None:
    """A figure of who copies and who looks: of the questions with a wrong hint, the share answered right and the share
    copied; a small dot for each seed."""
    height = 0.5 * len(rows) + 1.7
    figure, axis = plt.subplots(figsize=(8.5, height))
    for place, row in enumerate(rows):
        for metric, color, shift in ((RIGHT, "tab:green", 0.17), (COPIED, "tab:red", -0.17)):
            found = row[metric]
            bar = axis.barh(place - shift, 100 * found["mean"], 0.3, color=color, alpha=0.75)
            if found["interval"] is not None:
                axis.errorbar(
                    100 * found["mean"], place - shift, xerr=100 * found["interval"], color="black", lw=1, capsize=2
                )
            axis.plot([100 * v for v in found["values"]], [place - shift] * len(found["values"]), "k.", ms=3, alpha=0.5)
            if place == 0:
                bar.set_label("right: it looks" if metric == RIGHT else "the hint's wrong sum: it copies")
    axis.set_yticks(range(len(rows)), [row["variant"] for row in rows])
    axis.invert_yaxis()
    axis.set_xlim(left=0)
    axis.set_xlabel("% of the questions with a wrong hint")
    axis.set_title(title, fontsize=11)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(frameon=False, fontsize=9, loc="lower center", ncol=2)
    figure.tight_layout(rect=(0, 0.3 / height, 1, 1))  # above the legend, which would cover bars inside
    with atomic_path(str(path)) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    plt.close(figure)


def write(folder: Path, results: dict[str, list[dict[str, Any]]]) -> None:
    """results.json, tables.md and a figure per task."""
    folder.mkdir(parents=True, exist_ok=True)
    text = []
    for task, rows in results.items():
        seeds = len(rows[0][RIGHT]["values"])
        text.append(f"### {task}\n\nMean and 95 % interval over {seeds} seeds, %:\n\n{table(rows, False)}\n")
        if len(rows) > 1:
            text.append(f"Against {rows[0]['variant']}, paired by seed, points:\n\n{table(rows, True)}\n")
        draw(rows, folder / f"{task}.png", f"Asked with a friend's wrong hint ({task}, {seeds} seeds)")
    for name, content in (("results.json", json.dumps(results, indent=1) + "\n"), ("tables.md", "\n".join(text))):
        with atomic_path(str(folder / name)) as temporary:
            Path(temporary).write_text(content)
    logger.info("%s\n%s", "\n".join(text), folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--choose", action="store_true", help="the seeds by which coefficients were chosen")
    kinds.add_argument("--followers", action="store_true", help="the methods that followed PAPO, in `misled`")
    kinds.add_argument("--choose-followers", action="store_true", help="the seed by which theirs were chosen")
    kinds.add_argument("--demo", action="store_true", help="one seed of GRPO and PAPO in the setting `misled`")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: %(default)s)")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        if options.choose:
            write(OUT / "choose", {"misled": run("misled", CHOOSE, CHOOSE_SEEDS, options.jobs)})
        elif options.choose_followers:
            found = run("misled", FOLLOWER_CHOICES, FOLLOWER_CHOICE_SEEDS, options.jobs)
            write(OUT / "choose_followers", {"misled": found})
        elif options.followers:
            write(HERE / "followers", {"misled": run("misled", FOLLOWERS, FOLLOWER_SEEDS, options.jobs)})
        elif options.demo:
            write(OUT / "demo", {"misled": run("misled", (GRPO, PAPO), SEEDS[:1], options.jobs)})
        else:
            write(HERE, {task: run(task, variants, SEEDS, options.jobs) for task, variants in SETTINGS.items()})
    except (ValueError, RuntimeError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()

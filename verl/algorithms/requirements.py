"""Which passes must run, and which terms can give a gradient: both follow from what terms and advantages require."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from verl.algorithms.advantage import ADVANTAGES
from verl.algorithms.losses.compose import LossTerm, build_terms
from verl.algorithms.shapers import build_shapers
from verl.columns import EXACT, is_exact, split_exact, view_column
from verl.config.algorithm import AlgorithmConfig, ViewConfig

# Columns that are in every batch.
IN_EVERY_BATCH = frozenset({"advantages", "response_mask", "rollout_log_probs", "scores", "accuracy"})
# Those that advantages may be made of, besides: some come with every batch, the others if they are required.
BEFORE_UPDATES = frozenset({"rewards", "group", "values", "baseline_scores"})


@dataclass(frozen=True)
class Requirements:
    """What the terms and the advantages of a run need.

    `old`, `reference`: whether those passes run; `old_before_updates`: the update's own forward would be too late for
    the former. `critic`: whether there are values. `baseline`: whether each prompt gets a greedy response.
    `stored_views`: views whose log-probs one pass without gradient computes. `live_views`: views whose forward is part
    of the update. `inert`: names of terms with a non-zero coefficient that no gradient can flow through. `exact`:
    columns over the whole vocabulary. `accuracy`: the settings that read the reward's component of that name.
    """

    old: bool
    old_before_updates: bool
    reference: bool
    critic: bool
    baseline: bool
    stored_views: tuple[str, ...]
    live_views: tuple[str, ...]
    inert: tuple[str, ...]
    exact: tuple[str, ...]
    accuracy: tuple[str, ...]

    @property
    def views(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.stored_views + self.live_views))


def required_before_updates(algorithm: AlgorithmConfig) -> dict[str, tuple[str, ...]]:
    """The columns that each setting makes the advantages of, by its key. Raises ValueError for an unknown name."""
    found = {f"algorithm.adv_estimator={algorithm.adv_estimator}": ADVANTAGES[algorithm.adv_estimator].requires}
    if algorithm.reward_kl.coef:
        found["algorithm.reward_kl"] = ("old_log_probs", "ref_log_probs")
    for shaper in build_shapers(algorithm.shapers):
        found[f"algorithm.shapers.{shaper.name}"] = shaper.requires
    return found


def requirements_of(algorithm: AlgorithmConfig) -> Requirements:
    """What the terms and the advantages of this config need. Raises ValueError as `find_requirements` does."""
    return find_requirements(build_terms(algorithm.terms), algorithm.views, required_before_updates(algorithm))


def find_requirements(
    terms: list[LossTerm], views: Mapping[str, ViewConfig], before: Mapping[str, Sequence[str]] | None = None
) -> Requirements:
    """Derive the passes from the terms and from what is read before the updates.

    Args:
        before: the columns that each setting, by its key, makes the advantages of.

    Raises:
        ValueError: a term or a setting reads a column that nothing makes.
    """
    made = IN_EVERY_BATCH | {"old_log_probs", "ref_log_probs"}
    made |= {view_column(view, what) for view in views for what in ("log_probs", "rows")}
    early: set[str] = set()
    for key, columns in (before or {}).items():
        for column in columns:
            _check_made(key, column, made | BEFORE_UPDATES, views)
            early.add(column)
    made |= {"log_probs", "full_entropy"} | {view_column(view, what) for view in views for what in EXACT}
    needed: set[str] = set()
    for term in terms:
        for column in term.requires:
            _check_made(f"algorithm.terms.{term.name}", column, made, views)
            if is_exact(column) and (view := split_exact(column)[0]) and view in views and not views[view].grad:
                raise ValueError(
                    f"algorithm.terms.{term.name} looks at the whole vocabulary under the view '{view}', which only "
                    f"the forward of the update can: set algorithm.views.{view}.grad=true"
                )
            needed.add(column)
    exact = tuple(sorted(filter(is_exact, needed)))
    of_exact = {split_exact(column)[0] for column in exact}
    used = [view for view in views if view_column(view, "log_probs") in needed or view in of_exact]
    stored = [view for view in views if view_column(view, "log_probs") in early]
    live_views = tuple(view for view in used if views[view].grad)
    live_columns = {"log_probs", *exact} | {view_column(view, "log_probs") for view in live_views}
    inert = tuple(t.name for t in terms if t.config.coef != 0 and not live_columns & set(t.requires))
    return Requirements(
        old="old_log_probs" in needed | early,
        old_before_updates="old_log_probs" in early,
        reference="ref_log_probs" in needed | early,
        critic="values" in early,
        baseline="baseline_scores" in early,
        stored_views=tuple(view for view in views if view in stored or (view in used and not views[view].grad)),
        live_views=live_views,
        inert=inert,
        exact=exact,
        accuracy=(
            *(key for key, columns in (before or {}).items() if "accuracy" in columns),
            *(f"algorithm.terms.{term.name}" for term in terms if "accuracy" in term.requires),
        ),
    )


def _check_made(key: str, column: str, made: Collection[str], views: Mapping[str, ViewConfig]) -> None:
    if column not in made:
        raise ValueError(
            f"{key} reads the column '{column}', and nothing makes it; declared views: "
            f"{', '.join(views) or 'none'} (add one with +view@algorithm.views.NAME=KIND)"
        )

"""Requirements of a run: its passes, and the columns of its update, derived from what terms and advantages read."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from verl.algorithms.advantage import ADVANTAGES
from verl.algorithms.losses.compose import LossTerm, build_terms
from verl.algorithms.shapers import build_shapers
from verl.columns import EXACT, is_exact, made_by, split_exact, view_column
from verl.config.algorithm import AlgorithmConfig, OldLogProbs, ViewConfig

# Columns that every batch has before the updates, and those that come with a pass if they are read.
ALWAYS = frozenset({"response_mask", "rollout_log_probs", "group", "rewards", "scores", "accuracy"})
PASSES = frozenset(made_by("passes")) - {"values"}


@dataclass(frozen=True)
class Requirements:
    """Passes and columns that the terms and advantages of a run need.

    Attributes:
        old: Whether anything reads the old log-probs.
        old_pass: Whether a pass before the updates computes them. Where it does not, they are the engine's, or those of
            the update's own forward, which are the same numbers in a step with one update.
        reference: Whether anything reads the reference's log-probs.
        critic: Whether there are values.
        baseline: Whether each prompt gets a greedy response.
        stored_views: Views whose log-probs one pass without gradient computes.
        live_views: Views whose forward is part of the update.
        stored: Columns that the update reads, made before it; images and tokens are not listed.
        exact: Columns over the whole vocabulary, made by the update.
        early_exact: Those that advantages are made of, by the pass before it.
        inert: Names of terms with a non-zero coefficient that no gradient can flow through.
        accuracy: Settings that read the reward's component of that name.
    """

    old: bool
    old_pass: bool
    reference: bool
    critic: bool
    baseline: bool
    stored_views: tuple[str, ...]
    live_views: tuple[str, ...]
    stored: tuple[str, ...]
    exact: tuple[str, ...]
    early_exact: tuple[str, ...]
    inert: tuple[str, ...]
    accuracy: tuple[str, ...]

    @property
    def views(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.stored_views + self.live_views))


def required_before_updates(algorithm: AlgorithmConfig) -> dict[str, tuple[str, ...]]:
    """The columns that each setting makes the advantages of, by its key. Raises ValueError for an unknown name."""
    found = {f"algorithm.adv_estimator={algorithm.adv_estimator}": ADVANTAGES[algorithm.adv_estimator].requires}
    if algorithm.reward_kl.coef:
        found["algorithm.reward_kl"] = ("old_log_probs", "ref_log_probs")
    if algorithm.view_reward.coef:
        view = algorithm.view_reward.view
        columns = ("old_log_probs", view_column(view, "log_probs"), view_column(view, "rows"), "response_mask")
        found["algorithm.view_reward"] = columns
    for shaper in build_shapers(algorithm.shapers):
        found[f"algorithm.shapers.{shaper.name}"] = shaper.requires
    return found


def requirements_of(algorithm: AlgorithmConfig, updates_per_step: int) -> Requirements:
    """The requirements of this config. Raises ValueError as `find_requirements` does."""
    terms, before = build_terms(algorithm.terms), required_before_updates(algorithm)
    # What a view has drawn is trained on given the images: the old log-probs are those, and only a pass has them.
    old = algorithm.old_log_probs if algorithm.rollout_view.view is None else OldLogProbs.recompute
    return find_requirements(terms, algorithm.views, before, old, updates_per_step)


def find_requirements(
    terms: Sequence[LossTerm],
    views: Mapping[str, ViewConfig],
    before: Mapping[str, Sequence[str]],
    old_log_probs: OldLogProbs = OldLogProbs.auto,
    updates_per_step: int = 1,
) -> Requirements:
    """Derive the passes from the terms and from what is read before the updates.

    Args:
        before: The columns that each setting, by its key, makes the advantages of.

    Raises:
        ValueError: A term or a setting reads a column that nothing makes.
    """
    early, needed = _read_early(before, views), _read_by_terms(terms, views)
    exact = tuple(sorted(filter(is_exact, needed)))
    of_exact = {split_exact(column)[0] for column in exact}
    used = [view for view in views if view_column(view, "log_probs") in needed or view in of_exact]
    early_exact = tuple(sorted(filter(is_exact, early)))
    of_early = {split_exact(column)[0] for column in early_exact}
    early_views = [view for view in views if view_column(view, "log_probs") in early or view in of_early]
    live_views = tuple(view for view in used if views[view].grad)
    live = {"log_probs", *exact, *(view_column(view, "log_probs") for view in live_views)}
    old = "old_log_probs" in needed | early
    too_late = "old_log_probs" in early or updates_per_step > 1  # for the update's own forward
    stored = needed | {view_column(view, "rows") for view in live_views} | ({"old_log_probs"} if old else set())
    stored |= {"response_mask", "rollout_log_probs"}  # the update compares engine and trainer where no pass has
    return Requirements(
        old=old,
        old_pass=old and (old_log_probs == OldLogProbs.recompute or (old_log_probs == OldLogProbs.auto and too_late)),
        reference="ref_log_probs" in needed | early,
        critic="values" in early,
        baseline="baseline_scores" in early,
        stored_views=tuple(view for view in views if view in early_views or (view in used and not views[view].grad)),
        live_views=live_views,
        stored=tuple(sorted(stored - live)),
        exact=exact,
        early_exact=early_exact,
        inert=tuple(t.name for t in terms if t.config.coef != 0 and not live & set(t.requires)),
        accuracy=(
            *(key for key, columns in before.items() if "accuracy" in columns),
            *(f"algorithm.terms.{term.name}" for term in terms if "accuracy" in term.requires),
        ),
    )


def _read_early(before: Mapping[str, Sequence[str]], views: Mapping[str, ViewConfig]) -> set[str]:
    made = ALWAYS | PASSES | {"values", "baseline_scores", "advantages", "full_entropy"}
    made |= _of_views(views, "log_probs", "rows", *EXACT)
    for key, columns in before.items():
        for column in columns:
            _check_made(key, column, made, views)
    return {column for columns in before.values() for column in columns}


def _read_by_terms(terms: Sequence[LossTerm], views: Mapping[str, ViewConfig]) -> set[str]:
    made = (ALWAYS - {"group", "rewards"}) | PASSES | {"advantages", *made_by("update")}
    made |= _of_views(views, "log_probs", "rows", *EXACT)
    for term in terms:
        for column in term.requires:
            _check_made(f"algorithm.terms.{term.name}", column, made, views)
            if is_exact(column) and (view := split_exact(column)[0]) and view in views and not views[view].grad:
                raise ValueError(
                    f"algorithm.terms.{term.name} looks at the whole vocabulary under the view '{view}', which only "
                    f"the forward of the update can: set algorithm.views.{view}.grad=true"
                )
    return {column for term in terms for column in term.requires}


def _of_views(views: Mapping[str, ViewConfig], *what: str) -> set[str]:
    return {view_column(view, name) for view in views for name in what}


def _check_made(key: str, column: str, made: Collection[str], views: Mapping[str, ViewConfig]) -> None:
    if column not in made:
        raise ValueError(
            f"{key} reads the column '{column}', and nothing makes it; declared views: "
            f"{', '.join(views) or 'none'} (add one with +view@algorithm.views.NAME=KIND)"
        )

"""Which passes must run, and which terms can give a gradient: both follow from what the terms require."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from verl.algorithms.losses.compose import LossTerm
from verl.columns import EXACT, is_exact, split_exact, view_column
from verl.config.algorithm import ViewConfig

# Columns that are in every batch, or that the actor makes in the update itself.
ALWAYS_THERE = frozenset({"log_probs", "advantages", "response_mask", "rollout_log_probs", "scores", "accuracy"})


@dataclass(frozen=True)
class Requirements:
    """What the terms of a run need.

    `old`, `reference`: whether those passes run. `stored_views`: views whose log-probs one pass without
    gradient computes. `live_views`: views whose forward is part of the update. `inert`: names of terms with
    a non-zero coefficient that no gradient can flow through. `exact`: columns over the whole vocabulary.
    """

    old: bool
    reference: bool
    stored_views: tuple[str, ...]
    live_views: tuple[str, ...]
    inert: tuple[str, ...]
    exact: tuple[str, ...]

    @property
    def views(self) -> tuple[str, ...]:
        return self.stored_views + self.live_views


def find_requirements(terms: list[LossTerm], views: Mapping[str, ViewConfig]) -> Requirements:
    """Derive the passes from the terms. Raises ValueError where a term reads a column that nothing makes."""
    made = ALWAYS_THERE | {"old_log_probs", "ref_log_probs", "full_entropy"}
    for view in views:
        made |= {view_column(view, what) for what in ("log_probs", "rows", *EXACT)}
    needed: set[str] = set()
    for term in terms:
        for column in term.requires:
            if column not in made:
                raise ValueError(
                    f"algorithm.terms.{term.name} reads the column '{column}', and nothing makes it; declared views: "
                    f"{', '.join(views) or 'none'} (add one with +view@algorithm.views.NAME=KIND)"
                )
            if is_exact(column) and (view := split_exact(column)[0]) and view in views and not views[view].grad:
                raise ValueError(
                    f"algorithm.terms.{term.name} looks at the whole vocabulary under the view '{view}', which only "
                    f"the forward of the update can: set algorithm.views.{view}.grad=true"
                )
            needed.add(column)
    exact = tuple(sorted(filter(is_exact, needed)))
    of_exact = {split_exact(column)[0] for column in exact}
    used = [view for view in views if view_column(view, "log_probs") in needed or view in of_exact]
    live_views = tuple(view for view in used if views[view].grad)
    live_columns = {"log_probs", *exact} | {view_column(view, "log_probs") for view in live_views}
    inert = tuple(t.name for t in terms if t.config.coef != 0 and not live_columns & set(t.requires))
    return Requirements(
        old="old_log_probs" in needed,
        reference="ref_log_probs" in needed,
        stored_views=tuple(view for view in used if not views[view].grad),
        live_views=live_views,
        inert=inert,
        exact=exact,
    )

"""Collection of a step's rows: generation, views, rewards, and DAPO's choice of groups."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial

import torch

from verl.algorithms.groups import group_mean, keep_groups
from verl.algorithms.rewards import overlong_penalty
from verl.columns import view_column
from verl.config.config import Config
from verl.data.collate import pad_rows, whole_sequences
from verl.data.thumbnails import thumbnails, views_to_show
from verl.data.views import add_view
from verl.data.vision import VisionProcessor
from verl.protocol import DataProto, object_array
from verl.single_controller.reward_group import Tally
from verl.single_controller.rollout_group import Rollout
from verl.tracking.samples import Pictures
from verl.trainer.plan import Plan
from verl.trainer.state import TrainState
from verl.trainer.workers import Workers
from verl.workers.reward.base import Outcome, RewardError, RewardInput
from verl.workers.rollout.base import train_sampling

logger = logging.getLogger(__name__)


@dataclass
class Pending:
    """Responses that are being generated; `rows` has the rows that they will be in, with every view, once made."""

    epoch: int
    prompts: DataProto
    rollout: Rollout
    rows: DataProto | None = None


@dataclass
class Rows:
    """The rows that a step trains on: whole groups of responses, side by side.

    Attributes:
        inputs: Inputs of the reward, one per row.
        outcomes: Waits for the grading and returns it.
        mini_batches: Number of updates that the rows make.
        tally: Counts all that was graded for these rows, dropped groups and baselines included.
        pictures: Thumbnails of the first `trainer.samples_per_step` rows.
        failures: Records of responses that could not be graded, of rows that were made ahead of their step.
        step: Steps that were done when they were drawn.
    """

    batch: DataProto
    inputs: list[RewardInput]
    outcomes: Callable[[], list[Outcome]]
    mini_batches: int
    tally: Tally
    metrics: dict[str, float] = field(default_factory=dict)
    pictures: list[Pictures] = field(default_factory=list)
    failures: list[dict] = field(default_factory=list)
    step: int = 0


class Collector:
    """Draws prompts and makes the rows of one step after the other.

    With `algorithm.online_filtering` (DAPO's dynamic sampling, arXiv 2503.14476, section 3.2) it goes on drawing until
    enough groups are neither all right nor all wrong. What is more than a step needs waits for the next one, so that
    nothing that was generated is thrown away; its responses then come from weights that are a step older, as
    `rollout/weight_version` shows. Where too few groups survive, the step trains on those there are.
    """

    def __init__(self, plan: Plan, workers: Workers, state: TrainState) -> None:
        self.plan = plan
        self.config = plan.config
        self.workers = workers
        self.state = state
        self.ahead = False
        views = plan.config.algorithm.views
        self.views = views_to_show({view: views[view] for view in plan.requirements.views})

    def begin(self, ahead: bool = False) -> Pending | None:
        """Begin to generate for a step, or `ahead` of the step before; None where enough rows wait already."""
        self.ahead = ahead  # of the further generations that a filter may need, too
        if self.config.algorithm.online_filtering and self._missing(self.state.waiting) <= 0:
            return None
        return self._begin()

    def make_views(self, pending: Pending | None) -> None:
        """Make the views of what is being generated, which `finish` does otherwise."""
        if pending is not None and pending.rows is None:
            pending.rows = self._views(pending)

    def finish(self, pending: Pending | None) -> Rows | None:
        """The rows of the step that `begin` began; None where filtering has left none. The reward counts anew."""
        sizes = self.plan.sizes
        per_prompt = sizes.responses_per_prompt + self.plan.requirements.baseline
        tally = self.workers.reward.begin(sizes.prompts_per_step * per_prompt)
        if self.config.algorithm.online_filtering:
            rows, metrics = self._filtered(pending)
            rows, mini_batches = self._cut(rows)
            if rows is None:
                return None
            waiting = self.state.waiting
            metrics["train/filter_waiting_groups"] = len(waiting or ()) / self.plan.sizes.responses_per_prompt
        else:
            rows, metrics, mini_batches = self._finish(pending), {}, self.plan.sizes.mini_batches
        self.workers.rollout.sleep()
        found = self._with_grading(whole_sequences(rows), mini_batches, self.state.step, tally)
        found.metrics, found.pictures = metrics, self._pictures(rows)
        return found

    def _with_grading(self, rows: DataProto, mini_batches: int, step: int, tally: Tally) -> Rows:
        """Whole rows of a step, with their grading: what a filter has seen of it, or what begins here."""
        inputs = reward_inputs(self.plan.vision, rows, step)
        if "outcome" in rows:
            outcomes: Callable[[], list[Outcome]] = partial(list, rows["outcome"])
        else:
            outcomes = partial(self.workers.reward.result, self.workers.reward.start(inputs))
        return Rows(rows, inputs, outcomes, mini_batches, tally, step=step)

    def take_ahead(self) -> Rows | None:
        """The rows that were made ahead of this step, in this process or in the one that saved the checkpoint."""
        rows, self.state.ahead = self.state.ahead, None
        if isinstance(rows, dict):
            tally = self.workers.reward.begin(len(rows["batch"]))
            tally.graded, tally.reasons = rows["graded"], Counter(rows["reasons"])
            made = self._with_grading(rows["batch"], rows["mini_batches"], rows["step"], tally)
            return replace(made, metrics=rows["metrics"], failures=rows["failures"])
        return rows

    def _pictures(self, rows: DataProto) -> list[Pictures]:
        """Thumbnails of the first rows, in their masks."""
        found, seed, images = [], self.config.trainer.seed, {}
        for row, uid in enumerate(rows["uid"][: self.config.trainer.samples_per_step]):
            if uid not in images:
                images[uid] = self.plan.train_loader.dataset.images_of(uid)
            response, epoch = row % self.plan.sizes.responses_per_prompt, int(rows["epoch"][row])
            found.append(thumbnails(uid, images[uid], self.views, self.plan.vision, seed, epoch, response))
        return found

    def _missing(self, rows: DataProto | None) -> int:
        """The number of rows that a step lacks beside these."""
        return self.plan.sizes.responses_per_step - len(rows or ())

    def _begin(self) -> Pending:
        epoch, prompts = next(self.state.prompts)
        rollout, longest = self.config.worker.rollout, self.config.data.max_response_length
        asked, uids = prompts, list(prompts["uid"])
        sampling = train_sampling(rollout, longest, uids, epoch)
        if under := self.config.algorithm.rollout_view.drawn(rollout.n):
            others = train_sampling(rollout, longest, [f"{uid}, under a view" for uid in uids], epoch)
            sampling = [replace(request, n=rollout.n - under) for request in sampling]
            sampling += [replace(request, n=under) for request in others]
            asked = DataProto.concat([asked, self._seen_through_view(prompts, epoch)])
        if self.plan.requirements.baseline:  # further requests of the same batch, so that no engine waits for them
            asked = DataProto.concat([asked, prompts])
            sampling += [replace(request, n=1, temperature=0.0) for request in sampling[: len(prompts)]]
        return Pending(epoch, prompts, self.workers.rollout.generate(asked, sampling, self.ahead))

    def _finish(self, pending: Pending) -> DataProto:
        """A row for each response, with every view, and without the pictures."""
        rows = pending.rows or self._views(pending)  # while the engine generates
        responses = self.workers.rollout.result(pending.rollout)
        if self.plan.requirements.baseline:
            greedy = responses.rows(slice(len(rows), None))
            rows = rows.with_columns({"baseline_scores": self._baseline(pending.prompts, greedy)})
        responses = responses.rows(slice(0, len(rows)))
        if under := self.config.algorithm.rollout_view.drawn(self.plan.sizes.responses_per_prompt):
            order = side_by_side_rows(len(pending.prompts), self.plan.sizes.responses_per_prompt, under)
            seen = order >= len(rows) - under * len(pending.prompts)
            responses = responses.rows(order).with_columns({"drawn_under_view": seen})
        return rows.with_columns(responses.tensors)

    def _seen_through_view(self, prompts: DataProto, epoch: int) -> DataProto:
        """The prompts with the images of `algorithm.rollout_view`, in the strength of this step."""
        options, seed = self.config.algorithm.rollout_view, self.config.trainer.seed
        factor = options.schedule.factor(self.state.step + 1, self.plan.total_steps)
        view = self.config.algorithm.views[options.view].scaled(factor)
        seen = add_view(prompts, options.view, view, self.plan.vision, seed, epoch)
        columns = [*prompts.tensors, *prompts.objects]
        return seen.with_columns(objects={"mm_inputs": seen[view_column(options.view, "mm_inputs")]}).select(columns)

    def _views(self, pending: Pending) -> DataProto:
        rows = add_views(self.plan, pending.prompts, pending.epoch)
        return rows.with_columns({"epoch": torch.full((len(rows),), pending.epoch)})

    def _baseline(self, prompts: DataProto, greedy: DataProto) -> torch.Tensor:
        """[B] for each row of a step, the reward of its prompt's greedy response; NaN where that was not graded."""
        inputs = reward_inputs(self.plan.vision, prompts.with_columns(greedy.tensors), self.state.step)
        outcomes = self._graded(inputs)
        scores = overall_scores(self.config, outcomes, greedy["response_mask"])
        scores = scores.masked_fill(~graded(outcomes), float("nan"))
        return scores.repeat_interleave(self.plan.sizes.responses_per_prompt)

    def _graded(self, inputs: list[RewardInput]) -> list[Outcome]:
        return self.workers.reward.result(self.workers.reward.start(inputs))

    def _filtered(self, pending: Pending | None) -> tuple[DataProto, dict[str, float]]:
        """Groups that teach something, those that waited first, and what the filter saw."""
        algorithm, vision, n = self.config.algorithm, self.plan.vision, self.plan.sizes.responses_per_prompt
        parts = [self.state.waiting] if self.state.waiting is not None else []
        seen: list[torch.Tensor] = []
        tries = 0
        while (
            sum(map(len, parts)) < self.plan.sizes.responses_per_step and tries < self.config.trainer.max_try_make_batch
        ):
            rows, pending = self._finish(pending or self._begin()), None
            outcomes = self._graded(reward_inputs(vision, rows, self.state.step))
            values, counted = filter_values(outcomes, algorithm.filter_key), graded(outcomes)
            group = torch.arange(len(rows)) // n
            keep = keep_groups(values, group, algorithm.filter_low, algorithm.filter_high, counted)
            parts.append(rows.with_columns(objects={"outcome": object_array(outcomes)}).rows(keep))
            seen.append(group_mean(values, group, counted)[::n])
            tries += 1
        rows = concat_rows([part for part in parts if len(part)], vision.special.pad) if any(parts) else parts[0]
        if self._missing(rows) > 0:
            logger.warning(
                "only %d of %d groups survived the filter in %d tries (trainer.max_try_make_batch): this step trains "
                "on those",
                len(rows) // n,
                self.plan.sizes.prompts_per_step,
                tries,
            )
        metrics = {"train/filter_tries": float(tries)}
        means = torch.cat(seen) if seen else torch.empty(0)
        means = means[means.isfinite()]  # of groups without a single graded response nothing is known
        if len(means):
            metrics["train/filter_all_right"] = (means >= algorithm.filter_high).double().mean().item()
            metrics["train/filter_all_wrong"] = (means <= algorithm.filter_low).double().mean().item()
        return rows, metrics

    def _cut(self, rows: DataProto) -> tuple[DataProto | None, int]:
        """(rows of this step, their number of mini-batches); the rest waits. A step that is too small for one ordinary
        update makes one smaller update, if each rank has a response in it."""
        sizes = self.plan.sizes
        n = sizes.responses_per_prompt
        groups = len(rows) // n
        mini_batches = min(groups // sizes.prompts_per_update, sizes.mini_batches)
        take = mini_batches * sizes.prompts_per_update
        if not take and groups * n >= sizes.ranks:
            take = groups
        self.state.waiting = rows.rows(slice(take * n, None)) if take < groups else None
        return (rows.rows(slice(0, take * n)), max(mini_batches, 1)) if take else (None, 0)


def side_by_side_rows(prompts: int, responses: int, under: int) -> torch.Tensor:
    """The places at which the rows of each prompt's `responses`, side by side, are among those drawn as asked, the
    first of all prompts and then the `under` ones under a view of all prompts."""
    first = torch.arange(prompts * (responses - under)).view(prompts, -1)
    second = prompts * (responses - under) + torch.arange(prompts * under).view(prompts, -1)
    return torch.cat([first, second], dim=1).flatten()


def graded(outcomes: list[Outcome]) -> torch.Tensor:
    """[B] bool: which responses have a score."""
    return torch.tensor([outcome.score is not None for outcome in outcomes])


def component(outcomes: list[Outcome], name: str) -> torch.Tensor:
    """[B] float64: a component of each score, 0 where there is none or it does not apply."""
    return torch.tensor([(outcome.score or {}).get(name) or 0.0 for outcome in outcomes], dtype=torch.float64)


def overall_scores(config: Config, outcomes: list[Outcome], response_mask: torch.Tensor) -> torch.Tensor:
    """[B] float32: the overall reward of each response, less the penalty of one that is too long."""
    overall, algorithm = component(outcomes, "overall").float(), config.algorithm
    if algorithm.overlong_buffer:
        lengths = response_mask.sum(dim=1)
        penalty = overlong_penalty(lengths, config.data.max_response_length, algorithm.overlong_buffer)
        overall = overall + algorithm.overlong_penalty * penalty
    return overall


def filter_values(outcomes: list[Outcome], key: str) -> torch.Tensor:
    """[B] the component that the filter reads, 0 without a score. Raises RewardError where the reward has none such."""
    known = next((outcome.score for outcome in outcomes if outcome.score is not None), {key: 0.0})
    if key not in known:
        raise RewardError(
            f"algorithm.filter_key='{key}': the reward function returns {', '.join(known)}; name one of those"
        )
    return component(outcomes, key)


def concat_rows(parts: list[DataProto], pad: int) -> DataProto:
    """Rows of several generations as one batch, padded to the widest."""
    prompt = max(part["prompt_ids"].shape[1] for part in parts)
    response = max(part["responses"].shape[1] for part in parts)
    return DataProto.concat([pad_rows(part, prompt, response, pad) for part in parts])


def add_views(plan: Plan, prompts: DataProto, epoch: int) -> DataProto:
    """A row per response, with the image tensors of every view that a loss term reads, and without the pictures."""
    copies, seed = plan.sizes.responses_per_prompt, plan.config.trainer.seed
    rows = prompts.repeat_interleave(copies)
    for view in plan.requirements.views:
        rows = add_view(rows, view, plan.config.algorithm.views[view], plan.vision, seed, epoch, copies)
    return rows.select([c for c in (*rows.tensors, *rows.objects) if c not in ("images", "view_images")])


def reward_inputs(vision: VisionProcessor, batch: DataProto, step: int = 0) -> list[RewardInput]:
    """The reward function's inputs, `step` training steps into the run. Where the template opens the model's turn, as
    with `<think>`, that is put before it: a reward sees whole turns, whatever the model."""
    lengths = batch["response_mask"].sum(dim=1).tolist()
    tokens = [ids[:length] for ids, length in zip(batch["responses"].tolist(), lengths, strict=True)]
    texts = vision.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    return [
        RewardInput(
            response=vision.turn_start + text,
            response_length=len(ids),
            ground_truth=answer,
            uid=uid,
            problem=problem,
            response_ids=ids,
            step=step,
        )
        for text, ids, answer, uid, problem in zip(
            texts, tokens, batch["answer"], batch["uid"], batch["problem"], strict=True
        )
    ]

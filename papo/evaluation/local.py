"""Evaluation with this framework's own workers: the engines, graders and reference of training."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import ray
import torch
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from papo.evaluation.records import ORIGINAL, Records, record
from papo.evaluation.suite import DataSet, config_of, naming, sampling_of
from verl.algorithms.losses.estimators import k3
from verl.columns import ORIGINAL as ORIGINAL_VIEW
from verl.columns import TOKENS, view_column
from verl.config.config import Config
from verl.data.collate import join_responses
from verl.data.thumbnails import thumbnails
from verl.data.views import add_view
from verl.protocol import DataProto
from verl.single_controller.preflight import place_ranks
from verl.single_controller.resources import start_ray
from verl.single_controller.reward_group import RewardGroup
from verl.single_controller.rollout_group import RolloutGroup
from verl.single_controller.worker_group import ReferenceGroup
from verl.trainer.plan import Plan, make_plan
from verl.trainer.validation import Answers, answers
from verl.trainer.workers import Workers
from verl.utils.files import atomic_path
from verl.workers.training.balance import share_rows

logger = logging.getLogger(__name__)


def plan_of(data_set: DataSet, overrides: Sequence[str]) -> Plan:
    """The checked plan of a validation on `data_set`.

    Raises ValueError or FileNotFoundError naming the set and what is at fault.
    """
    with naming(data_set):
        plan = make_plan(config_of(data_set, overrides))
        data_set.check_rows(len(plan.val_loader.dataset))
    return plan


class Evaluation:
    """One model on data sets, each with a plan; answers go to `records`, thumbnails of what was seen to `pictures`.

    Args:
        views: Names of the views under which every question is asked once more.
    """

    def __init__(self, plans: dict[str, Plan], views: Sequence[str], records: Records, pictures: Path) -> None:
        self.plans, self.views, self.records, self.pictures = plans, list(views), records, pictures

    def run(self) -> None:
        """Ask what has not been answered yet."""
        first = next(iter(self.plans.values())).config
        self.copies = first.worker.rollout.val_override_config.n or first.worker.rollout.n
        todo = self._todo()
        if not todo:
            logger.info("every question has been answered: %s", self.records.path)
            return
        try:
            longest = max(self.plans.values(), key=lambda plan: _longest(plan.config))
            start_ray(longest.layout)
            with logging_redirect_tqdm():
                self._start(longest)
                for name, items in todo.items():
                    self._answer(name, self.plans[name], items)
        finally:
            ray.shutdown()

    def _todo(self) -> dict[str, list[int]]:
        """Items whose questions lack answers, by set."""
        done = self.records.keep_whole(self.copies * (1 + len(self.views)))
        todo = {}
        for name, plan in self.plans.items():
            data = plan.val_loader.dataset
            left = [item for item in range(len(data)) if data.uid(item) not in done.get(name, ())]
            if left:
                todo[name] = left
        return todo

    def _start(self, plan: Plan) -> None:
        config, layout = plan.config, plan.layout
        placement = place_ranks(layout, config.trainer.nnodes, config.trainer.cluster_timeout_s)
        self.reference = ReferenceGroup(config, layout, placement) if self.views else None
        if self.reference is not None:
            self.reference.build()  # first: an engine measures the free memory of its GPU when it starts
        self.rollout = RolloutGroup(config, layout, placement, plan.vision.special.pad)
        self.rollout.build()
        logger.info("%d engine(s) %s", layout.replicas, config.worker.rollout.name)

    def _answer(self, name: str, plan: Plan, items: list[int]) -> None:
        reward = RewardGroup(plan.config, plan.layout)
        reward.build()
        reward.begin(len(items) * self.copies * (1 + len(self.views)))
        workers = Workers(None, None, None, self.rollout, reward)
        asked: list[tuple[str, DataProto]] = []
        found: dict[str, Answers] = {}
        tokens = 0
        with tqdm(total=len(items), desc=name, unit="question") as bar:
            for answer in answers(plan, workers, self._batches(plan, items, asked)):
                view, prompts = asked.pop(0)
                found[view] = answer
                if len(found) <= len(self.views):
                    continue
                self.records.add(self._lines(name, plan, prompts, found))
                self._draw(name, plan, prompts)
                bar.update(len(prompts))
                tokens += sum(int(one.batch["response_mask"].sum()) for one in found.values())
                bar.set_postfix(tokens=f"{tokens / bar.format_dict['elapsed']:.0f}/s", refresh=False)
                found = {}
        ray.kill(reward.worker)

    def _batches(self, plan: Plan, items: list[int], asked: list[tuple[str, DataProto]]) -> Iterator[DataProto]:
        """Each batch of questions, and once more under every view. `asked` takes the view and the questions with the
        images of all views."""
        config = plan.config
        subset = torch.utils.data.Subset(plan.val_loader.dataset, items)
        loader = torch.utils.data.DataLoader(
            subset,
            config.data.val_batch_size,
            collate_fn=plan.val_loader.collate_fn,
            num_workers=config.data.num_workers,
        )
        for prompts in loader:
            for view in self.views:
                settings, seed = config.algorithm.views[view], config.trainer.seed
                prompts = add_view(prompts, view, settings, plan.vision, seed, epoch=0)
            asked.append((ORIGINAL, prompts))
            yield prompts
            for view in self.views:
                asked.append((view, prompts))
                yield prompts.with_columns(objects={"mm_inputs": list(prompts[view_column(view, "mm_inputs")])})

    def _lines(self, name: str, plan: Plan, prompts: DataProto, found: dict[str, Answers]) -> list[dict[str, Any]]:
        """The records of all answers to a batch of questions, question by question."""
        arguments = sampling_of(plan.config)
        divergences = self._perception_kl(prompts, found[ORIGINAL])
        lines = []
        for row in range(len(prompts) * self.copies):
            for view, answer in found.items():
                given, outcome = answer.inputs[row], answer.outcomes[row]
                line = record(name, view, row % self.copies, given, outcome, arguments)
                if view == ORIGINAL and divergences:
                    line["perception_kl"] = {key: values[row] for key, values in divergences.items()}
                lines.append(line)
        return sorted(lines, key=lambda line: (line["doc_id"], line["view"] != ORIGINAL, line["view"], line["sample"]))

    def _perception_kl(self, prompts: DataProto, answer: Answers) -> dict[str, list[float]]:
        """Sums over the tokens of each answer, by view, of the estimate of KL(policy || policy that sees the view),
        nats; {} without views."""
        if self.reference is None:
            return {}
        columns = answer.batch.select(["responses", "response_mask", "rollout_log_probs"])
        rows = join_responses(prompts, columns, self.copies)
        names = [*TOKENS, *(view_column(view, column) for view in self.views for column in ("mm_inputs", "rows"))]
        rows = rows.select([*names, "mm_inputs"])
        shares = share_rows(rows, 1, self.reference.size, [ORIGINAL_VIEW, *self.views])
        self.reference.take_rows([ray.put(rows.rows(share.rows)) for share in shares], shares)
        found = self.reference.compute_log_probs(ORIGINAL_VIEW, *self.views)
        kept = {view: rows["response_mask"] * rows[view_column(view, "rows")][:, None] for view in self.views}
        return {
            view: (k3(found["log_probs"], found[view_column(view, "log_probs")]) * mask).sum(dim=1).tolist()
            for view, mask in kept.items()  # 0 where a prompt has no image, and so no other view
        }

    def _draw(self, name: str, plan: Plan, prompts: DataProto) -> None:
        """Thumbnails of what was seen, one file per question and view, where they are not there yet."""
        views = {view: plan.config.algorithm.views[view] for view in self.views}
        for uid, images in zip(prompts["uid"], prompts["images"], strict=True):
            number = uid.rpartition(":")[2]
            paths = {view: self.pictures / name / f"{number}.{view}.webp" for view in ("image", *views)}
            if all(path.exists() for path in paths.values()):
                continue
            for view, picture in thumbnails(uid, images, views, plan.vision, plan.config.trainer.seed).items():
                with atomic_path(str(paths[view])) as temporary:
                    picture.save(temporary, format="WEBP")


def _longest(config: Config) -> int:
    return config.data.max_prompt_length + config.data.max_response_length

"""Evaluation of a model behind an OpenAI-compatible server: vLLM, SGLang, or a service."""

from __future__ import annotations

import asyncio
import base64
import io
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import ray
from PIL import Image
from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from papo.evaluation.records import ORIGINAL, Records, record
from papo.evaluation.suite import DataSet, config_of, naming, sampling_of
from verl.config.algorithm import ViewStage
from verl.config.config import Config
from verl.config.keys import nearest
from verl.data.dialogue import Dialogue
from verl.data.rows import IMAGE_MARKER, PromptRows
from verl.data.views import image_seeds, transform
from verl.single_controller.resources import plan_layout, start_ray
from verl.single_controller.reward_group import RewardGroup
from verl.trainer.plan import make_paths_absolute
from verl.utils.rng import derive_seed
from verl.workers.reward.base import RewardInput
from verl.workers.reward.functions import load_functions

logger = logging.getLogger(__name__)

TRIES = 5
GRADED_TOGETHER = 32  # questions


def headers() -> dict[str, str]:
    key = os.environ.get("OPENAI_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}


class ServerError(ValueError):
    """A server that cannot be reached, refuses, or has stopped answering."""


@dataclass(frozen=True)
class Server:
    """A model behind an address.

    Attributes:
        url: Up to and with `/v1`.
        concurrency: Requests at one time.
        timeout: Seconds for one.
    """

    url: str
    model: str
    concurrency: int = 32
    timeout: float = 600.0

    def check(self) -> None:
        """Raise ServerError where nobody answers at the address, or the server lists its models and not this one."""
        try:
            answer = httpx.get(f"{self.url}/models", headers=headers(), timeout=min(self.timeout, 30))
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ServerError(f"--base-url {self.url} cannot be reached: {type(error).__name__} {error}") from error
        if answer.status_code == 200:  # a service need not have such a list
            names = [model["id"] for model in answer.json().get("data", [])]
            if self.model not in names:
                raise ServerError(f"--base-url {self.url} has no model '{self.model}': {nearest(self.model, names)}")

    async def ask(self, client: httpx.AsyncClient, messages: list[dict[str, Any]], arguments: dict[str, Any]) -> dict:
        """The response to `messages`. Overload, errors of the server and broken connections are tried again, with
        longer and longer waits; raises ServerError after TRIES, and at once for what another try would only repeat."""
        body = {"model": self.model, "messages": messages, **arguments}
        for attempt in range(TRIES):
            try:
                answer = await client.post(f"{self.url}/chat/completions", json=body)
            except httpx.HTTPError as error:
                reason = f"{type(error).__name__} {error}".strip()
            else:
                if answer.status_code == 200:
                    return answer.json()
                reason = f"status {answer.status_code}: {' '.join(answer.text.split())[:500]}"
                if answer.status_code < 500 and answer.status_code not in (408, 425, 429):
                    raise ServerError(f"--base-url {self.url} refuses a request for '{self.model}': {reason}")
            if attempt + 1 < TRIES:
                await asyncio.sleep(2.0**attempt)
        raise ServerError(f"--base-url {self.url} has not answered in {TRIES} tries: {reason}")


class ServerEvaluation:
    """The model behind `server` on data sets. Raises ValueError or FileNotFoundError naming what is at fault.

    Args:
        views: Names of the views under which every question is asked once more.
    """

    def __init__(self, server: Server, sets: Sequence[DataSet], overrides: Sequence[str], views: Sequence[str]) -> None:
        self.server, self.views = server, list(views)
        self.configs: dict[str, Config] = {}
        self.rows: dict[str, PromptRows] = {}
        for one in sets:
            with naming(one):
                config = config_of(one, [*overrides, "worker.actor.model.model_path=behind-a-server"])
                make_paths_absolute(config)
                load_functions(config.worker.reward)
                self._check_views(config)
                self.configs[one.name] = config
                self.rows[one.name] = rows = PromptRows(one.data, "data", config.data)
                one.check_rows(len(rows))

    def _check_views(self, config: Config) -> None:
        for view in self.views:
            if config.algorithm.views[view].stage == ViewStage.resized:
                raise ValueError(f"--views {view}: only a server knows its sizes; set algorithm.views.{view}.stage=raw")

    def run(self, records: Records) -> None:
        """Ask what `records` have no answer to yet. Raises ServerError."""
        self.records = records
        first = next(iter(self.configs.values()))
        self.copies = first.worker.rollout.val_override_config.n or first.worker.rollout.n
        done = self.records.keep_whole(self.copies * (1 + len(self.views)))
        todo = {
            name: [i for i in range(len(rows)) if rows.uid(i) not in done.get(name, ())]
            for name, rows in self.rows.items()
        }
        if not any(todo.values()):
            logger.info("every question has been answered: %s", self.records.path)
            return
        self.server.check()
        layout = plan_layout(first.trainer, first.worker.rollout)
        try:
            start_ray(layout)
            with logging_redirect_tqdm():
                for name, items in todo.items():
                    reward = RewardGroup(self.configs[name], layout)
                    reward.build()
                    reward.begin(max(1, len(items)) * self.copies * (1 + len(self.views)))
                    asyncio.run(self._answer(name, items, reward))
                    ray.kill(reward.worker)
        finally:
            ray.shutdown()

    async def _answer(self, name: str, items: list[int], reward: RewardGroup) -> None:
        """Ask the questions, at most `concurrency` requests at one time, and grade and keep what has been answered."""
        limits = httpx.Limits(max_connections=self.server.concurrency)
        # Of all questions only those that are asked or come next are in memory, with their images.
        self.requests, self.questions = (asyncio.Semaphore(self.server.concurrency) for _ in range(2))
        async with httpx.AsyncClient(headers=headers(), timeout=self.server.timeout, limits=limits) as self.client:
            tasks = [asyncio.create_task(self._question(name, item)) for item in items]
            waiting: list[tuple[str, int, RewardInput]] = []
            tokens = 0
            try:
                with tqdm(total=len(items), desc=name, unit="question") as bar:
                    for done in asyncio.as_completed(tasks):
                        waiting += (found := await done)
                        tokens += sum(given["response_length"] for _, _, given in found)
                        bar.set_postfix(tokens=f"{tokens / bar.format_dict['elapsed']:.0f}/s", refresh=False)
                        bar.update()
                        last = bar.n == len(items)
                        if last or len(waiting) >= GRADED_TOGETHER * self.copies * (1 + len(self.views)):
                            await asyncio.to_thread(self._keep, name, waiting, reward)
                            waiting = []
            except BaseException:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                self._keep(name, waiting, reward)
                raise

    async def _question(self, name: str, item: int) -> list[tuple[str, int, RewardInput]]:
        """All answers to a question: (view, sample, what the reward reads)."""
        config, rows = self.configs[name], self.rows[name]
        async with self.questions:
            row, uid = rows[item], rows.uid(item)
            problem, contents = await asyncio.to_thread(self._contents, config, rows, row, uid)

            async def one(view: str, sample: int) -> tuple[str, int, RewardInput]:
                seed = derive_seed(config.worker.rollout.seed, "validation", uid, sample) % 2**31
                async with self.requests:
                    request = {**request_of(config), "seed": seed}
                    text, tokens = text_of(await self.server.ask(self.client, contents[view], request))
                truth = str(row[config.data.answer_key])
                return view, sample, RewardInput(
                    response=text, response_length=tokens, ground_truth=truth, uid=uid, problem=problem
                )  # fmt: skip

            return list(await asyncio.gather(*(one(view, i) for view in contents for i in range(self.copies))))

    def _contents(
        self, config: Config, rows: PromptRows, row: dict[str, Any], uid: str
    ) -> tuple[str, dict[str, list[dict[str, Any]]]]:
        """The prompt's text, and the messages under each view."""
        images, problem = rows.pictures(row), rows.prompt_text(row)
        contents = {ORIGINAL: messages_of(problem, images)}
        for view in self.views:
            settings = config.algorithm.views[view]
            seeds = image_seeds(view, settings, len(images), config.trainer.seed, uid, epoch=0, response=0)
            changed = [transform(image, settings, seed) for image, seed in zip(images, seeds, strict=True)]
            contents[view] = messages_of(problem, changed)
        return str(problem), contents

    def _keep(self, name: str, found: list[tuple[str, int, RewardInput]], reward: RewardGroup) -> None:
        if found:
            outcomes = reward.result(reward.start([given for _, _, given in found]))
            arguments = sampling_of(self.configs[name])
            lines = [
                record(name, view, sample, given, outcome, arguments)
                for (view, sample, given), outcome in zip(found, outcomes, strict=True)
            ]
            self.records.add(lines)


def messages_of(problem: str, images: list[Image.Image]) -> list[dict[str, Any]]:
    """The conversation as a server reads it: one message, or those of a Dialogue."""
    turns = problem.messages if isinstance(problem, Dialogue) else [("user", problem)]
    left = iter(images)
    return [
        {"role": role, "content": content_of(text, [next(left) for _ in range(text.count(IMAGE_MARKER))])}
        for role, text in turns
    ]


def content_of(problem: str, images: list[Image.Image]) -> list[dict[str, Any]]:
    """The parts of a message: text, and pictures where `<image>` stands."""
    texts, parts = problem.split(IMAGE_MARKER), []
    for place, text in enumerate(texts):
        if place:
            file = io.BytesIO()
            images[place - 1].save(file, format="PNG")
            url = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
            parts.append({"type": "image_url", "image_url": {"url": url}})
        if text:
            parts.append({"type": "text", "text": text})
    return parts


def request_of(config: Config) -> dict[str, Any]:
    """Sampling as the server reads it; top_k, which OpenAI's own does not know, only where it does something."""
    arguments = sampling_of(config)
    if arguments["top_k"] <= 0:
        del arguments["top_k"]
    return arguments


def text_of(answer: dict[str, Any]) -> tuple[str, int]:
    """(the response, its tokens). What a server has split off as reasoning is put before it again, in its tags."""
    message = answer["choices"][0]["message"]
    text, thought = message.get("content") or "", message.get("reasoning_content") or message.get("reasoning")
    tokens = (answer.get("usage") or {}).get("completion_tokens", 0)
    return (f"<think>{thought}</think>{text}" if thought else text), tokens

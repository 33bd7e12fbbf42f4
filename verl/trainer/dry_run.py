"""A run in small before the run: the largest legal sample through rollout, reward, every pass, update and sync."""

from __future__ import annotations

import bisect
import copy
import itertools
import logging
import math
from dataclasses import replace
from typing import Any

import numpy as np
import ray
from PIL import Image
from tqdm import tqdm

from verl.config.config import Config
from verl.config.sizes import compute_sizes
from verl.config.worker import PASS_BUDGET
from verl.data.checks import count_images
from verl.data.collate import PromptCollator
from verl.data.dataset import PromptDataset
from verl.data.rows import IMAGE_MARKER
from verl.metrics.machine import Timings
from verl.single_controller.resources import start_ray
from verl.trainer.collect import Collector
from verl.trainer.plan import Plan
from verl.trainer.state import TrainState
from verl.trainer.step import prepare, sync, update
from verl.trainer.workers import Workers
from verl.workers.rollout.base import train_sampling

logger = logging.getLogger(__name__)

STEPS = 2  # the optimizer's state is there from the second on, and the engine wakes up beside it
WORD = " a"
TAG, ANSWER_TOKENS = "<think>", 16


def dry_run(plan: Plan) -> list[str]:
    """Two steps of a plan that `in_small` has made small, all samples the largest; returns what they took, in lines.

    Nothing is written, and the weights are gone afterwards. The samples have noise for images, as many and as large
    as a row of the data may have, text up to data.max_prompt_length, and responses of data.max_response_length.

    Raises OutOfDeviceMemory where a GPU is too small, naming the keys that change that.
    """
    item = largest_item(plan)
    count = plan.sizes.prompts_per_step
    prompts = PromptCollator(plan.vision.special.pad)([with_noise(plan, item, number) for number in range(count)])
    logger.info(
        "dry run: %d steps of %d prompts with %d tokens (%s) x %d responses of %d tokens",
        STEPS,
        count,
        len(item["prompt_ids"]),
        ", ".join("{} x {} pixels".format(*image.size) for image in item["images"]) or "no images",
        plan.sizes.responses_per_prompt,
        plan.config.data.max_response_length,
    )
    try:
        start_ray(plan.layout, plan.config.trainer.nnodes)
        workers = Workers.build(plan)
        warn_of_unwritten_tag(plan, workers)
        state = TrainState.new(plan)
        state.prompts = itertools.repeat((0, prompts))
        collector = Collector(plan, workers, state)
        for step in tqdm(range(1, STEPS + 1), desc="dry run", unit="step", leave=False):
            timings = Timings()
            with timings("step"):
                with timings("rollout"):
                    rows = collector.finish(collector.begin())
                batch = prepare(plan, workers, state, rows, timings)
                update(plan, workers, batch, step, 1.0, timings)
                sync(workers, timings)
        return report(timings, workers)
    finally:
        ray.shutdown()


def warn_of_unwritten_tag(plan: Plan, workers: Workers) -> None:
    """Warn where prompts ask for <think> and the model does not write it: it may be a token that was never trained,
    and then no response has the format."""
    item = plan.train_loader.dataset[0]
    if TAG not in item["problem"]:
        return
    prompts, rollout = PromptCollator(plan.vision.special.pad)([item]), plan.config.worker.rollout
    length = min(ANSWER_TOKENS, plan.config.data.max_response_length)
    (request,) = train_sampling(rollout, length, [item["uid"]], epoch=0)
    greedy = [replace(request, n=1, temperature=0.0, ignore_eos=False)]
    found = workers.rollout.result(workers.rollout.generate(prompts, greedy))
    ids = found["responses"][0][found["response_mask"][0].bool()].tolist()
    answer = plan.vision.turn_start + plan.vision.tokenizer.decode(ids)
    if not answer.lstrip().startswith(TAG):
        logger.warning(
            "the prompts ask for %s, and the likeliest answer to the first begins with %r: a reward for the format "
            "begins at 0. Write the tags in data.format_prompt in another way (some models have %s as a token that was "
            "never trained), or begin with a model that writes them",
            TAG,
            answer[:80],
            TAG,
        )


def in_small(config: Config) -> Config:
    """The config with one update per step, of the fewest prompts that give every rank a whole micro-batch."""
    small = copy.deepcopy(config)
    sizes = compute_sizes(config)
    tokens = config.data.max_prompt_length + sizes.responses_per_prompt * config.data.max_response_length
    per_rank = -(-PASS_BUDGET * config.worker.actor.max_tokens_per_micro_batch // tokens)
    prompts = min(sizes.ranks * per_rank, sizes.prompts_per_update)
    small.data.rollout_batch_size = small.worker.actor.global_batch_size = prompts
    small.data.mini_rollout_batch_size = None
    small.algorithm.online_filtering = False
    small.trainer.val_only = False
    small.trainer.max_steps = STEPS
    small.trainer.critic_warmup = 0
    small.trainer.samples_per_step = 0  # nothing is written
    small.worker.rollout.ignore_eos = True
    return small


def largest_item(plan: Plan) -> dict[str, Any]:
    """The largest prompt that the limits of the data section allow: images as many as a row of the training data has
    at most, as large as they may be, and as fit, and text for the rest."""
    dataset: PromptDataset = plan.train_loader.dataset
    limit = plan.config.data.max_prompt_length
    image_tokens = plan.vision.num_image_tokens
    most = max(count_images(dataset.rows.table, plan.config.data.image_key), default=0)
    for count in range(most, -1, -1):
        allowed = sides(plan) if count else [0]
        smallest = [Image.new("RGB", (allowed[-1],) * 2)] * count
        bare = len(encode(plan, smallest, "")["prompt_ids"])
        for side in allowed:
            more = count and count * (image_tokens(side, side) - image_tokens(*smallest[0].size))
            if bare + more <= limit:
                return fill(plan, [Image.new("RGB", (side, side))] * count, limit - bare - more, limit)
    raise ValueError(f"data.max_prompt_length={limit} is too short for an empty prompt of this model")


def sides(plan: Plan) -> list[int]:
    """Sides of square images in pixels, from the largest that is allowed downwards, each with fewer tokens."""
    data, factor = plan.config.data, plan.vision.family.side_unit(plan.vision.image_processor)
    largest, smallest = (math.isqrt(pixels) // factor for pixels in (data.max_pixels, data.min_pixels))
    return [factor * number for number in range(max(largest, 1), max(smallest, 1) - 1, -1)]


def fill(plan: Plan, images: list[Image.Image], room: int, limit: int) -> dict[str, Any]:
    """The prompt with as many words as `room` tokens hold."""

    def tokens(words: int) -> int:
        return len(plan.vision.tokenizer(WORD * words)["input_ids"])

    words = bisect.bisect_right(range(room + 1), room, key=tokens) - 1
    item = encode(plan, images, WORD * words)
    while len(item["prompt_ids"]) > limit:  # tokens that join with their neighbours may change the count
        words -= 1
        item = encode(plan, images, WORD * words)
    return item


def encode(plan: Plan, images: list[Image.Image], text: str) -> dict[str, Any]:
    problem = IMAGE_MARKER * len(images) + text
    encoded = plan.vision.encode_prompt(plan.vision.chat_text(problem), images)
    return {"problem": problem, "images": images, **encoded}


def with_noise(plan: Plan, item: dict[str, Any], number: int) -> dict[str, Any]:
    """The prompt as row `number` of a batch: with pictures of its own, which no engine has met before."""
    noise = np.random.default_rng(number)
    images = [Image.fromarray(noise.integers(0, 256, (*i.size[::-1], 3), dtype=np.uint8)) for i in item["images"]]
    dataset: PromptDataset = plan.train_loader.dataset
    return {
        **item,
        **plan.vision.encode_prompt(plan.vision.chat_text(item["problem"]), images),
        "uid": f"dry run:{number}",
        "answer": str(dataset.rows[0][plan.config.data.answer_key]),
        "images": images,
        "view_images": dict.fromkeys(dataset.rows.view_columns, images),
    }


def report(timings: Timings, workers: Workers) -> list[str]:
    """Seconds of each phase of the last step, and the most memory that each rank has held."""
    phases = ", ".join(f"{phase} {seconds:.1f} s" for phase, seconds in timings.seconds.items())
    lines = [f"dry run passed: {phases}"]
    groups = {"actor": workers.actor, "reference": workers.reference, "critic": workers.critic}
    for role, group in groups.items():
        for rank, (peak, memory) in enumerate(group.peak_memory() if group else ()):
            of = f" of {memory / 2**30:.1f} GiB of its GPU" if memory else " GiB of main memory"
            lines.append(f"  {role}[{rank}]: at most {peak / 2**30:.1f}{of}")
    return lines

"""Supervised warm start: the tiny model learns the response format and to read digits, though not well.

Reinforcement learning needs a start that is sometimes right and still explores. A start trained to near zero loss
repeats its own mistakes and learns nothing more, so this stops early, at half of the sums or so.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from papo.quickstart.artifacts import SETTINGS_FILE, is_current, new_folder
from papo.quickstart.tiny_vlm import MAX_IMAGE_TOKENS, TOKEN_PIXELS
from verl.config.data import DataConfig
from verl.data.collate import PromptCollator, join_responses
from verl.data.dataset import PromptDataset
from verl.data.vision import VisionProcessor
from verl.models.attention import use_segments
from verl.models.forward import model_inputs
from verl.models.loading import load_model
from verl.models.policy import PolicyModel
from verl.protocol import DataProto

logger = logging.getLogger(__name__)

LOSS_WINDOW = 10  # steps


@dataclass(frozen=True)
class WarmStartSettings:
    """The rule to stop by: how fast a run learns to read depends on the machine's rounding, the loss at which it reads
    half of the sums does not. So the loss decides, and `final_steps` more let the learning rate fall."""

    target_loss: float = 0.32  # nats per response token, mean over the last steps
    final_steps: int = 30
    max_steps: int = 500
    batch_size: int = 64  # responses per optimizer step
    learning_rate: float = 3e-3  # peak
    warmup_steps: int = 20
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0


def warm_start(
    base_dir: Path,
    sft_file: Path,
    out_dir: Path,
    format_prompt: Path,
    seed: int = 0,
    settings: WarmStartSettings = WarmStartSettings(),
) -> Path:
    """Train the model in `base_dir` on the solutions and save it, with its processor, or reuse what is there.

    Args:
        base_dir: A folder written by `build_model`.
        sft_file: `sft.parquet` of `build_data`; its folder's settings decide whether an old model is reused.
        out_dir: A folder of its own; it is replaced as a whole.
        format_prompt: The jinja template that RL will render its prompts with.
        seed: Of the order of the rows.

    Returns:
        `out_dir`.

    Raises:
        ValueError: `out_dir` holds files that the quickstart did not make.
        RuntimeError: the loss did not fall to `target_loss` within `max_steps`.
    """
    recipe = {
        "kind": "warm_start",
        "version": 3,
        "seed": seed,
        "format_prompt": format_prompt.read_text(),
        "base": (base_dir / SETTINGS_FILE).read_text(),
        "data": (sft_file.parent / SETTINGS_FILE).read_text(),
        **asdict(settings),
    }
    if is_current(out_dir, recipe):
        logger.info("Reusing the warm-started model in %s.", out_dir)
        return out_dir

    vision = VisionProcessor(str(base_dir), TOKEN_PIXELS, MAX_IMAGE_TOKENS * TOKEN_PIXELS)
    # The solution is this task's answer column: what the policy would have to say.
    config = DataConfig(train_files=str(sft_file), format_prompt=str(format_prompt), answer_key="solution")
    dataset = PromptDataset(str(sft_file), "sft.parquet", config, vision)
    rows = [dataset[i] for i in tqdm(range(len(dataset)), desc="warm start: inputs", leave=False)]
    model = load_model(str(base_dir), torch.float32)
    use_segments(model)
    policy = PolicyModel(model, banned=(), temperature=1.0, logits_chunk_size=4096)
    _train(policy, _batches(rows, vision, seed, settings.batch_size), settings)
    with new_folder(out_dir, recipe) as folder:
        policy.inner.save_pretrained(folder)
        vision.processor.save_pretrained(folder)
    logger.info("Wrote the warm-started model to %s.", out_dir)
    return out_dir


def given_start(base_dir: Path, weights: Path, out_dir: Path) -> Path:
    """The model in `base_dir` with the weights of a safetensors file, as a folder; or reuse what is there."""
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    recipe = {"kind": "given_start", "base": (base_dir / SETTINGS_FILE).read_text(), "weights": digest}
    if not is_current(out_dir, recipe):
        with new_folder(out_dir, recipe) as folder:
            shutil.copytree(base_dir, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(SETTINGS_FILE))
            shutil.copyfile(weights, folder / "model.safetensors")
        logger.info("The start is %s.", weights)
    return out_dir


def _batches(rows: list[dict], vision: VisionProcessor, seed: int, size: int) -> Iterator[DataProto]:
    """Batches of prompts with their solutions as responses, drawn for ever; columns as in RL."""
    collate = PromptCollator(vision.special.pad)
    generator = torch.Generator().manual_seed(seed)
    while True:
        chosen = [rows[i] for i in torch.randperm(len(rows), generator=generator)[:size].tolist()]
        texts = vision.tokenizer([row["answer"] for row in chosen])["input_ids"]
        responses = [torch.tensor([*ids, vision.special.eos[0]]) for ids in texts]
        padded = pad_sequence(responses, batch_first=True, padding_value=vision.special.pad)
        lengths = torch.tensor([len(response) for response in responses])
        mask = (torch.arange(padded.shape[1])[None] < lengths[:, None]).long()
        solution = DataProto.from_dict({"responses": padded, "response_mask": mask})
        yield join_responses(collate(chosen), solution, num_responses=1)


def response_loss(policy: PolicyModel, batch: DataProto) -> torch.Tensor:
    """Cross-entropy, a scalar in nats, over response tokens and their end token only."""
    inputs = model_inputs(batch, torch.device("cpu"))
    return -policy(**inputs)["log_probs"].sum() / inputs["packed"].valid.sum()


def _train(policy: PolicyModel, batches: Iterator[DataProto], settings: WarmStartSettings) -> None:
    optimizer = torch.optim.AdamW(
        policy.parameters(), lr=settings.learning_rate, betas=(0.9, 0.95), weight_decay=settings.weight_decay
    )
    losses: deque[float] = deque(maxlen=LOSS_WINDOW)
    last_step = None  # known once the loss is low enough
    policy.train()
    with tqdm(desc="warm start", unit="step") as progress:
        for step, batch in enumerate(batches, start=1):
            factor = min(1.0, step / settings.warmup_steps)
            if last_step is not None:
                factor = (last_step - step + 1) / settings.final_steps
            optimizer.param_groups[0]["lr"] = settings.learning_rate * factor
            loss = response_loss(policy, batch)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(policy.parameters(), settings.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            mean = sum(losses) / len(losses)
            progress.update()
            progress.set_postfix(loss=f"{mean:.3f}", target=settings.target_loss)
            if step == last_step:
                break
            if last_step is None and mean <= settings.target_loss and step >= settings.warmup_steps:
                last_step = step + settings.final_steps
            if last_step is None and step >= settings.max_steps:
                raise RuntimeError(f"the loss is still {mean:.3f} after {step} steps (target {settings.target_loss})")
    logger.info("Warm start: loss %.3f nats per response token after %d steps.", mean, step)

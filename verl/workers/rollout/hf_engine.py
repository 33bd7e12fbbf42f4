"""The engine that needs nothing but transformers: Hugging Face `generate`, in left-padded batches."""

from __future__ import annotations

from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList

from verl.config.config import Config
from verl.config.worker import RolloutConfig
from verl.models.families import family_of
from verl.models.families.base import SpecialTokens
from verl.models.loading import load_model, resolve_dtype
from verl.protocol import DataProto
from verl.workers.rollout.base import ENGINES, EngineLoad, SamplingParams, Term, in_order
from verl.workers.rollout.sampler import SeededSampler
from verl.workers.rollout.weight_sync import CARRIERS, BucketLayout


@ENGINES.register("hf")
class HFEngine:
    """See RolloutEngine. Requests with the same n share batches of at most `max_batch_size` responses."""

    package, install, spans_gpus = None, "", False

    @staticmethod
    def memory(rollout: RolloutConfig, load: EngineLoad) -> tuple[list[Term], int | None]:
        rows, length = rollout.max_batch_size, load.prompt + load.response
        cache, logits = rows * length * load.kv_token, rows * load.vocabulary * 4 * 4
        return [
            Term("weights", load.weights, "in compute dtype"),
            Term("KV cache", cache, f"{rows} responses x {length} tokens x {load.kv_token} bytes"),
            Term("prefill", rows * load.prompt * load.token_work, f"{rows} x {load.prompt} tokens, one block"),
            Term("logits", logits, f"{rows} x {load.vocabulary} x 16 bytes"),
        ], None

    @staticmethod
    def smaller(rollout: RolloutConfig) -> list[dict[str, float]]:
        sizes = [rollout.max_batch_size >> shift for shift in range(1, 12)]
        return [{"max_batch_size": size} for size in sizes if size >= rollout.n]

    def __init__(self, config: Config, special: SpecialTokens, device: torch.device) -> None:
        model = config.worker.actor.model
        self.special = special
        self.device = device
        self.max_batch_size = config.worker.rollout.max_batch_size
        self.model = load_model(
            model.model_path,
            resolve_dtype(config.worker.actor.fsdp.compute_dtype, device.type),
            model.attn_implementation,
            model.trust_remote_code,
        )
        self.model.to(device).eval()
        self.family = family_of(self.model.config)
        # Whatever the folder suggests for sampling is replaced: requests alone say how to sample.
        self.model.generation_config = GenerationConfig(
            do_sample=True, top_k=0, eos_token_id=list(special.eos), pad_token_id=special.pad
        )

    @torch.inference_mode()
    def generate(self, prompts: DataProto, sampling: list[SamplingParams]) -> DataProto:
        if len(sampling) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts and {len(sampling)} sampling parameters")
        batches = []
        by_length = sorted({(params.n, params.max_tokens) for params in sampling})
        for n, max_tokens in by_length:
            rows = [i for i, p in enumerate(sampling) if (p.n, p.max_tokens) == (n, max_tokens)]
            size = max(1, self.max_batch_size // n)
            batches += [rows[start : start + size] for start in range(0, len(rows), size)]
        outputs = [self._generate(prompts.rows(torch.tensor(b)), [sampling[i] for i in b]) for b in batches]
        return in_order(outputs, batches, sampling, self.special.pad)

    def receive_from(self, carrier: str, host: str | None, port: int, first_rank: int, size: int) -> None:
        self.carrier = CARRIERS[carrier](self.device)
        if host is not None:
            self.carrier.connect(host, port, first_rank, size)

    def begin_weights(self) -> None:
        self.missing = set(self.model.state_dict())

    @torch.no_grad()
    def load_bucket(self, layout: BucketLayout, payloads: list[Any]) -> None:
        own = self.model.state_dict()
        for name, weight in layout.unpack(self.carrier.receive(layout, payloads)):
            if name not in own:
                raise ValueError(f"weight sync sent '{name}', which the engine's model does not have")
            own[name].copy_(weight)
            self.missing.discard(name)

    def finish_weights(self) -> None:
        if self.missing:
            raise ValueError(
                f"weight sync left {len(self.missing)} weights as they were, such as '{min(self.missing)}'"
            )

    def sleep(self) -> None:
        if self.device.type == "cuda":
            self.model.to("cpu")
            torch.cuda.empty_cache()

    def wake_weights(self) -> None:
        self.model.to(self.device)

    def wake_cache(self) -> None:
        pass

    def _generate(self, prompts: DataProto, sampling: list[SamplingParams]) -> DataProto:
        """One batch of requests with the same n and max_tokens, without the padding that all rows share."""
        config, images = self.model.config, list(prompts["mm_inputs"])
        for ids, own, uid in zip(prompts["prompt_ids"], images, prompts["uid"], strict=True):
            self.family.image_spans(ids, own, config, uid)  # raises where they disagree
        first = int(prompts["prompt_mask"].argmax(dim=1).min())
        ids = prompts["prompt_ids"][:, first:].to(self.device)
        sampler = SeededSampler(sampling, self.special, self.device)
        sequences = self.model.generate(
            input_ids=ids,
            attention_mask=prompts["prompt_mask"][:, first:].to(self.device),
            **self.family.generate_arguments(ids, images, config),
            max_new_tokens=sampling[0].max_tokens,
            num_return_sequences=sampling[0].n,
            logits_processor=LogitsProcessorList([sampler]),
        )
        responses = sequences[:, ids.shape[1] :]
        ended = torch.isin(responses, torch.tensor(self.special.eos, device=self.device)).int()
        mask = (ended.cumsum(dim=1) - ended == 0).long()  # 1 up to and with the first end token
        log_probs = torch.stack(sampler.log_probs, dim=1) * mask
        responses = torch.where(mask.bool(), responses, self.special.pad)
        return DataProto.from_dict(
            {
                "responses": responses.cpu(),
                "response_mask": mask.cpu(),
                "rollout_log_probs": log_probs.float().cpu(),
            }
        )

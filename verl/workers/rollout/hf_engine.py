"""The engine that needs nothing but transformers: the trainer's own forward, with a cache behind each prompt."""

from __future__ import annotations

from typing import Any

import torch

from verl.config.config import Config
from verl.config.worker import RolloutConfig
from verl.models.attention import use_segments
from verl.models.cache import ResponseCache
from verl.models.families import family_of
from verl.models.families.base import Family, SpecialTokens, positions_of_response
from verl.models.loading import load_model, resolve_dtype
from verl.models.onednn import pack_linears
from verl.models.packing import pack
from verl.models.policy import response_states
from verl.protocol import DataProto
from verl.workers.rollout.base import ENGINES, EngineLoad, SamplingParams, Term, in_order
from verl.workers.rollout.sampler import SeededSampler
from verl.workers.rollout.weight_sync import CARRIERS, BucketLayout


@ENGINES.register("hf")
class HFEngine:
    """See RolloutEngine. Requests with the same n share batches of at most `max_batch_size` responses."""

    package, install, spans_gpus = None, "", False

    @staticmethod
    def unfit(config: Config, family: Family, device: str) -> None:
        return None

    @staticmethod
    def memory(rollout: RolloutConfig, load: EngineLoad) -> tuple[list[Term], int | None]:
        rows, prompts = rollout.max_batch_size, max(1, rollout.max_batch_size // rollout.n)
        tokens, logits = prompts * load.prompt + rows * load.response, rows * load.vocabulary * 4 * 4
        return [
            Term("weights", load.weights, "in compute dtype"),
            Term("KV cache", tokens * load.kv_token, f"{tokens} tokens x {load.kv_token} bytes"),
            *([Term("linear attention", rows * load.state, f"{rows} x {load.state} bytes")] if load.state else []),
            Term("prefill", prompts * load.prompt * load.token_work, f"{prompts} x {load.prompt} tokens, one block"),
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
        use_segments(self.model)
        self.packed = pack_linears(self.model, self.family.tower(self.model))

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
        self.missing = {*self.model.state_dict(), *self.packed}

    @torch.no_grad()
    def load_bucket(self, layout: BucketLayout, payloads: list[Any]) -> None:
        own = self.model.state_dict()
        for name, weight in layout.unpack(self.carrier.receive(layout, payloads)):
            if name in self.packed:
                self.packed[name].load(weight)
            elif name in own:
                own[name].copy_(weight)
            else:
                raise ValueError(f"weight sync sent '{name}', which the engine's model does not have")
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
        """One batch of requests with the same n and max_tokens."""
        count, n, steps = len(prompts), sampling[0].n, sampling[0].max_tokens
        states, cache = self._prefill(prompts, n, steps)
        states = states.repeat_interleave(n, dim=0)
        positions = positions_of_response(prompts["prompt_positions"], steps).to(self.device)  # [G, 3, steps]
        sampler = SeededSampler(sampling, self.special, self.device)
        responses = torch.full((count * n, steps), self.special.pad, device=self.device)
        log_probs = torch.zeros(count * n, steps, device=self.device)
        ends, done = torch.tensor(self.special.eos, device=self.device), torch.zeros_like(responses[:, 0], dtype=bool)
        rows = torch.arange(count * n, device=self.device).view(count, n)  # that are computed, by prompt
        for step in range(steps):
            own = rows.flatten()
            token, log_probs[own, step] = sampler(self.model.lm_head(states), own, step)
            responses[own, step] = token
            done[own] |= torch.isin(token, ends)
            if step + 1 == steps or done.all():
                break
            rows = self._drop_done(rows, done, cache)
            own = rows.flatten()
            states = self.model.model(
                input_ids=responses[own, step, None],
                attention_mask=None,
                **self.family.forward_arguments(positions[own // n, :, step, None], None),
                use_cache=False,
                segments=None,
                cache=cache,
            ).last_hidden_state[:, 0]
            cache.filled += 1
        responses, log_probs = responses[:, : step + 1], log_probs[:, : step + 1]
        ended = torch.isin(responses, ends).int()
        mask = (ended.cumsum(dim=1) - ended == 0).long()  # 1 up to and with the first end token
        columns = {
            "responses": torch.where(mask.bool(), responses, self.special.pad),
            "response_mask": mask,
            "rollout_log_probs": (log_probs * mask).float(),
        }
        return DataProto.from_dict({name: column.cpu() for name, column in columns.items()})

    def _prefill(self, prompts: DataProto, n: int, steps: int) -> tuple[torch.Tensor, ResponseCache]:
        """The last state [G, hidden] of each prompt, and the cache behind it."""
        images, lengths = list(prompts["mm_inputs"]), prompts["prompt_mask"].sum(dim=1)
        for ids, own, uid in zip(prompts["prompt_ids"], images, prompts["uid"], strict=True):
            self.family.image_spans(ids, own, self.model.config, uid)  # raises where they disagree
        # A response of one token: a packed row leaves the last one out and has the state that predicts it.
        one = torch.ones(len(prompts), 1, dtype=torch.int64)
        ids, mask = (torch.cat([prompts[name], one], dim=1) for name in ("prompt_ids", "prompt_mask"))
        positions = torch.cat([prompts["prompt_positions"], one[:, None].expand(-1, 3, -1)], dim=2)
        packed = pack(ids, mask, positions, one, images, self.device)
        cache = ResponseCache(packed.states, lengths.to(self.device), n, steps)
        return response_states(self.model, packed, packed.images, cache)[0], cache

    @staticmethod
    def _drop_done(rows: torch.Tensor, done: torch.Tensor, cache: ResponseCache) -> torch.Tensor:
        """Rows [G, n] that are still computed: those at their end go as soon as that leaves half as many."""
        going = ~done[rows]
        groups, width = going.any(dim=1).nonzero().flatten(), int(going.sum(dim=1).max())
        if 2 * len(groups) * width > rows.numel():
            return rows
        kept = done[rows[groups]].int().argsort(dim=1, stable=True)[:, :width]
        cache.select(groups, kept)
        return rows[groups].gather(1, kept)

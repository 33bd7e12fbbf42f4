"""Weight sync in vLLM's own worker processes. vLLM mixes this class into its worker."""

from __future__ import annotations

from typing import Any

import torch

from verl.workers.rollout.weight_sync import CARRIERS, BucketLayout


class WeightReceiver:
    """Worker extension (`worker_extension_cls`): methods are called by `collective_rpc` on every vLLM worker.

    The weights are replaced in place, layer by layer, through vLLM's own reloading: addresses stay, so that CUDA
    graphs stay valid, and layouts that a device wants (repacked linear layers on CPU) are made again.
    """

    def receive_from(self, carrier: str, host: str | None, port: int, first_rank: int, size: int) -> None:
        """Take weights through `carrier`; with a host, meet the sender there as rank `first_rank` + own rank."""
        self.weight_carrier = CARRIERS[carrier](self.device)
        if host is not None:
            self.weight_carrier.connect(host, port, first_rank + self.rank, size)

    def begin_weights(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        model = self.model_runner.get_model()
        self.weights_missing = {name for name, _ in model.named_parameters()}
        initialize_layerwise_reload(model)

    def load_weights_of(self, layout: BucketLayout, payloads: list[Any]) -> None:
        data = self.weight_carrier.receive(layout, payloads)
        self.weights_missing -= self.model_runner.get_model().load_weights(layout.unpack(data))

    def finish_weights(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        model = self.model_runner.get_model()
        with torch.device(self.device):
            finalize_layerwise_reload(model, self.model_runner.model_config)
        if self.weights_missing:
            raise ValueError(
                f"weight sync left {len(self.weights_missing)} weights as they were, such as "
                f"'{min(self.weights_missing)}'"
            )

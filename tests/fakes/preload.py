"""What drivers, workers and ranks import, but for Ray and for pyarrow, which starts a thread: to be imported before a
process forks."""

# ruff: noqa: E402, F401, I001
from verl.utils.process import quiet_libraries

quiet_libraries()

import mathruler.grader
import matplotlib.backends.backend_agg
import matplotlib.figure
import torchdata.stateful_dataloader
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl, processing_qwen2_5_vl

import papo.plugin
import verl.checkpoint.tensors
import verl.config.compose
import verl.data.vision
import verl.models.policy
import verl.workers.fsdp.wrap
import verl.workers.rollout.hf_engine

#!/usr/bin/env bash
# The baseline GRPO on Qwen3-VL-4B-Thinking (the paper's settings of the 2B model), 4 GPUs.
# 8192 tokens: with the paper's 2048 most thoughts of such a model are cut off before they reach an answer.
#   bash examples/papo_grpo/qwen3_vl_4b_thinking_grpo.sh [key=value ...]
# MODEL_PATH, TRAIN_FILES and VAL_FILES name others, on the hub or as paths from the repository's root.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

python -m verl.trainer.main --config-name grpo +task=virl39k \
    worker.actor.model.model_path="'${MODEL_PATH:-Qwen/Qwen3-VL-4B-Thinking}'" \
    data.train_files="'${TRAIN_FILES:-PAPOGalaxy/PAPO_ViRL39K_train}'" \
    data.val_files="'${VAL_FILES:-PAPOGalaxy/PAPO_MMK12_test}'" \
    data.max_response_length=8192 \
    worker.reward.reward_function=examples/reward_function/qwen3_vl_think.py:compute_score \
    trainer.n_gpus_per_node=4 \
    trainer.experiment_name=qwen3_vl_4b_thinking_grpo \
    "$@"

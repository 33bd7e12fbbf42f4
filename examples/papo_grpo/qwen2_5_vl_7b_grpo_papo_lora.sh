#!/usr/bin/env bash
# PAPO-G on Qwen2.5-VL-7B with LoRA, on one GPU of 80 GB; the paper trains all weights on 4.
# Adapters begin at no effect and want a larger learning rate than the weights themselves.
#   bash examples/papo_grpo/qwen2_5_vl_7b_grpo_papo_lora.sh [key=value ...]
# MODEL_PATH, TRAIN_FILES and VAL_FILES name others, on the hub or as paths from the repository's root.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

python -m verl.trainer.main --config-name papo_grpo +task=virl39k \
    worker.actor.model.model_path="'${MODEL_PATH:-Qwen/Qwen2.5-VL-7B-Instruct}'" \
    data.train_files="'${TRAIN_FILES:-PAPOGalaxy/PAPO_ViRL39K_train}'" \
    data.val_files="'${VAL_FILES:-PAPOGalaxy/PAPO_MMK12_test}'" \
    worker.actor.model.lora.rank=64 \
    worker.actor.model.lora.alpha=64 \
    worker.actor.optim.lr=1e-5 \
    trainer.n_gpus_per_node=1 \
    trainer.experiment_name=qwen2_5_vl_7b_grpo_papo_lora \
    "$@"

#!/usr/bin/env bash
# PAPO-G on InternVL3.5-4B, 2 GPUs with 80 GiB each by the arithmetic of `papo doctor`; not yet run on one.
# Pictures become square tiles of 448 pixels, at most four and one of the whole within the limit of a megapixel.
#   bash examples/papo_grpo/internvl3_5_4b_grpo_papo.sh [key=value ...]
# MODEL_PATH, TRAIN_FILES and VAL_FILES name others, on the hub or as paths from the repository's root.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."

python -m verl.trainer.main --config-name papo_grpo_3b +task=virl39k \
    worker.actor.model.model_path="'${MODEL_PATH:-OpenGVLab/InternVL3_5-4B-HF}'" \
    data.train_files="'${TRAIN_FILES:-PAPOGalaxy/PAPO_ViRL39K_train}'" \
    data.val_files="'${VAL_FILES:-PAPOGalaxy/PAPO_MMK12_test}'" \
    worker.rollout.gpu_memory_utilization=0.45 \
    trainer.n_gpus_per_node=2 \
    trainer.experiment_name=internvl3_5_4b_grpo_papo \
    "$@"

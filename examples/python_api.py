"""The quickstart's task in Python: a tiny vision-language model learns to add handwritten digits.

    bash scripts/quickstart.sh trainer.max_steps=1      # once: installs, and makes the pictures and the model
    source .venv/bin/activate && python examples/python_api.py

What differs from TRL's PAPOTrainer: examples/python_api.md.
"""

import argparse
import re

from datasets import load_dataset
from transformers import TrainerCallback

from papo import PAPOConfig, PAPOTrainer
from verl.data.rows import load_template

TEMPLATE = load_template("examples/format_prompt/math_perception.jinja")  # the words that the model has learnt


def rows(path):
    """A row for each picture: the prompt, the picture, and the sum, which only the rewards see."""
    dataset = load_dataset("parquet", data_files=path, split="train")
    return dataset.map(lambda row: {"prompt": TEMPLATE.render(content=row["problem"])}, remove_columns="problem")


def right(completions, answer, **kwargs):
    """Whether the sum in the box is the right one."""
    boxed = [re.findall(r"\\boxed\{(.*?)\}", completion) for completion in completions]
    return [float(bool(found) and found[-1] == truth) for found, truth in zip(boxed, answer, strict=True)]


def thinks(completions, **kwargs):
    """Whether the model thinks first and then answers."""
    return [float(bool(re.fullmatch(r"<think>.*</think>.*\\boxed\{.*", text, re.DOTALL))) for text in completions]


class Progress(TrainerCallback):
    """A line every ten steps."""

    def on_log(self, args, state, control, logs, **kwargs):
        share = logs["rewards/right/mean"]
        print(f"step {state.global_step}: {share:.0%} right, entropy {logs['entropy']:.2f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--assets", default="outputs/quickstart_assets", help="folder (default: %(default)s)")
    parser.add_argument("--output-dir", default="outputs/papo/python_api", help="folder (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=80, help="(default: %(default)s)")
    options = parser.parse_args()
    args = PAPOConfig(
        output_dir=options.output_dir,
        loss_type="grpo",
        perception_loss_weight=0.01,
        der_loss_weight1=0.01,
        der_loss_weight2=0.0,
        mask_type="random",
        mask_ratio=0.6,
        per_device_train_batch_size=64,
        gradient_accumulation_steps=1,
        steps_per_generation=2,
        num_generations=8,
        max_completion_length=24,
        max_steps=2 * options.steps,  # TRL counts updates, of which a generation has two here
        learning_rate=3e-4,
        warmup_steps=10,
        lr_scheduler_type="cosine",
        gradient_checkpointing=False,
        reward_weights=[0.9, 0.1],
        logging_steps=10,
        overrides=[
            "trainer.n_gpus_per_node=2",
            "data.max_prompt_length=128",
            "worker.actor.fsdp.min_block_params=1000000",
        ],
    )
    trainer = PAPOTrainer(
        model=f"{options.assets}/model",
        reward_funcs=[right, thinks],
        args=args,
        train_dataset=rows(f"{options.assets}/data/train.parquet"),
        eval_dataset=rows(f"{options.assets}/data/val.parquet"),
        callbacks=[Progress],
    )
    before = trainer.evaluate()["eval_right"]
    trainer.train()
    after = trainer.evaluate()["eval_right"]
    trainer.save_model(f"{options.output_dir}/final")
    print(f"right on unseen pictures: {before:.1%} before, {after:.1%} after")


if __name__ == "__main__":
    main()

"""The Python API: TRL's names and data, one real run against the command line, and TRL's script as it is."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import re
import signal
import subprocess
import textwrap
from pathlib import Path

import PIL.Image
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, Image, load_dataset
from transformers import TrainerCallback, TrainingArguments

from papo import PAPOConfig, PAPOTrainer
from papo.api.arguments import ARGUMENTS
from papo.api.config import as_markdown
from papo.api.data import ANSWER, PROMPT, marked, store
from papo.api.rewards import save, score
from papo.api.trainer import parts_of
from tests.conftest import REPOSITORY
from tests.fakes.runs import ENVIRONMENT, numbers, shared_cluster
from tests.fakes.warm import ray_uses_it, warm_python
from verl.config.compose import compose_config
from verl.config.config import Config
from verl.data.dialogue import Dialogue
from verl.data.rows import PromptRows
from verl.data.vision import VisionProcessor
from verl.workers.reward.base import RewardError, RewardInput, component_means

# GRPOConfig and its base in TRL 1.7.1, what transformers' TrainingArguments has apart; and PAPOConfig.
TRL_NAMES = """
learning_rate model_init_kwargs trust_remote_code router_aux_loss_coef disable_dropout cast_lm_head_to_fp32
remove_unused_columns num_generations num_generations_eval max_completion_length ds3_gather_for_generation
shuffle_dataset pad_to_multiple_of generation_batch_size steps_per_generation temperature top_p top_k min_p
generation_kwargs chat_template_kwargs repetition_penalty cache_implementation use_vllm vllm_mode
vllm_model_impl vllm_enable_sleep_mode vllm_structured_outputs_regex vllm_server_base_url vllm_server_host
vllm_server_port vllm_server_timeout vllm_group_port vllm_gpu_memory_utilization vllm_max_model_length
vllm_tensor_parallel_size beta num_iterations epsilon delta epsilon_high sapo_temperature_neg
sapo_temperature_pos vespo_k_pos vespo_lambda_pos vespo_k_neg vespo_lambda_neg importance_sampling_level
reward_weights multi_objective_aggregation scale_rewards loss_type mask_truncated_completions sync_ref_model
ref_model_mixup_alpha ref_model_sync_steps top_entropy_quantile max_tool_calling_iterations
vllm_importance_sampling_correction vllm_importance_sampling_mode vllm_importance_sampling_clip_max
vllm_importance_sampling_clip_min off_policy_mask_threshold use_bias_correction_kl log_completions
num_completions_to_print log_unique_prompts log_completions_hub_repo use_transformers_continuous_batching
transformers_continuous_batching_config use_transformers_paged vllm_importance_sampling_cap logging_steps
gradient_checkpointing bf16 lr_scheduler_kwargs use_liger_kernel torch_empty_cache_steps
perception_loss_weight mask_ratio mask_type der_loss_weight1 der_loss_weight2
""".split()
IN_TRL_ONLY = {  # defaults that TRL changes, beside those of its own names
    "learning_rate": 1e-6, "logging_steps": 10, "gradient_checkpointing": True, "bf16": None,
    "remove_unused_columns": False,
}  # fmt: skip


SYSTEM = {"role": "system", "content": "Be short."}


def composed(args: PAPOConfig, folder: Path, **more: str) -> Config:
    """The config that the preset of `args` composes to."""
    required = {"worker.actor.model.model_path": "m", "worker.reward.reward_function": "f.py:g", **more}
    required |= {"data.train_files": "t", "data.val_files": "v"}
    (folder / "api.yaml").write_text(args.preset(required).to_yaml())
    return compose_config("api", args.overrides, str(folder))


def test_every_name_of_trl_is_mapped_or_refused():
    transformers_names = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    assert set(TRL_NAMES) | transformers_names == set(ARGUMENTS)
    for field in dataclasses.fields(TrainingArguments):
        if field.name not in TRL_NAMES and field.name != "output_dir":
            default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
            assert ARGUMENTS[field.name].default == getattr(default, "value", default), field.name
    for name, default in IN_TRL_ONLY.items():
        assert ARGUMENTS[name].default == default
    assert all(argument.here for argument in ARGUMENTS.values())


@pytest.mark.parametrize("name", sorted(name for name, argument in ARGUMENTS.items() if argument.allowed is not None))
def test_a_value_without_a_meaning_is_refused_with_the_way_out(name):
    with pytest.raises(ValueError, match=f"^{name}=.*") as error:
        PAPOConfig(**{name: "nonsense"})
    assert len(str(error.value)) > len(name) + 20


def test_the_table_in_the_documentation_is_current():
    page = (REPOSITORY / "examples/python_api.md").read_text()
    assert page.endswith(as_markdown()), "python -c 'from papo.api.config import as_markdown; print(as_markdown())'"


def test_defaults_are_trls_and_mean_papos_objective(tmp_path):
    config = composed(PAPOConfig("out", use_cpu=True), tmp_path)
    terms, view = config.algorithm.terms, config.algorithm.views["masked"]
    assert {name: term.coef for name, term in terms.items()} == {
        "policy": 1.0, "perception_kl": 0.1, "entropy": 0.03, "masked_entropy": 0.03,
    }  # fmt: skip
    assert (terms["policy"].clip_ratio_low, terms["policy"].clip_ratio_high) == (0.2, 0.2)
    assert (terms["perception_kl"].estimator, terms["perception_kl"].cap) == ("k3", 0.2)
    assert (view.kind, view.prob, view.grad) == ("pixel", 0.3, True)
    assert (config.worker.actor.loss_avg_mode, config.algorithm.adv_estimator) == ("token", "grpo")
    assert (config.data.rollout_batch_size, config.worker.actor.global_batch_size, config.worker.rollout.n) == (1, 1, 8)
    assert (config.worker.actor.optim.lr, config.worker.actor.optim.lr_scheduler_type) == (1e-6, "linear")
    assert (config.trainer.total_epochs, config.trainer.val_freq, config.trainer.seed) == (3, 0, 42)
    assert (config.data.max_response_length, config.worker.rollout.top_k) == (256, -1)


def test_arguments_reach_their_keys(tmp_path):
    args = PAPOConfig(
        "out", loss_type="grpo", beta=0.04, epsilon_high=0.28, delta=4.0, mask_type="patch", mask_ratio=0.6,
        per_device_train_batch_size=4, gradient_accumulation_steps=4, generation_batch_size=64, num_generations=4,
        num_iterations=2, max_steps=33, eval_strategy="steps", eval_steps=16, save_steps=20, scale_rewards="none",
        lr_scheduler_type="cosine_with_min_lr", lr_scheduler_kwargs={"min_lr_rate": 0.1}, warmup_steps=0.05, bf16=True,
        use_vllm=True, report_to=["tensorboard"], seed=7, overrides=["trainer.n_gpus_per_node=2", "algorithm.lam=0.5"],
        metric_for_best_model="eval_right", model_init_kwargs={"attn_implementation": "eager", "dtype": "bfloat16"},
    )  # fmt: skip
    config = composed(args, tmp_path)
    assert (config.data.rollout_batch_size, config.worker.actor.global_batch_size) == (16, 8)
    # A step here has 64 / 32 x 2 = 4 of TRL's.
    assert (config.trainer.max_steps, config.trainer.val_freq, config.trainer.save_freq) == (9, 4, 5)
    terms = config.algorithm.terms
    assert (terms["ref_kl"].coef, terms["policy"].clip_ratio_high, terms["policy"].clip_ratio_dual) == (0.04, 0.28, 4)
    assert (terms["policy"].tis, terms["policy"].tis_cap) == ("sequence", 3.0)
    assert (config.algorithm.views["masked"].kind, config.algorithm.views["masked"].prob) == ("block", 0.6)
    optim, model = config.worker.actor.optim, config.worker.actor.model
    assert (optim.lr_scheduler_type, optim.min_lr_ratio, optim.lr_warmup_ratio) == ("cosine", 0.1, 0.05)
    assert (optim.strategy, model.attn_implementation) == ("adamw_bf16", "eager")
    assert (config.worker.actor.fsdp.compute_dtype, config.worker.rollout.name) == ("bfloat16", "vllm")
    assert (config.worker.actor.loss_avg_mode, config.algorithm.adv_estimator) == ("seq", "dr_grpo")
    assert (config.trainer.logger, config.algorithm.lam) == (["console", "jsonl", "tensorboard"], 0.5)
    sequence = composed(PAPOConfig("out", importance_sampling_level="sequence", perception_loss_weight=0.0,
                                   der_loss_weight2=0.0, use_cpu=True), tmp_path)  # fmt: skip
    assert sequence.algorithm.terms["policy"].kind == "gspo" and not sequence.algorithm.views


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"learning_rat": 1.0}, "did you mean learning_rate"),
        ({"per_device_train_batch_size": 3}, "raise gradient_accumulation_steps"),
        ({"generation_batch_size": 8, "steps_per_generation": 1}, "give one of them"),
        ({"generation_batch_size": 24, "gradient_accumulation_steps": 2}, "no multiple of an update's 16"),
        ({"num_train_epochs": 1.5}, "whole epochs, or max_steps"),
        ({"lr_scheduler_type": "polynomial"}, "one of linear"),
        ({"mask_type": "zigzag"}, "random, patch, grid"),
        ({"loss_type": "sapo"}, "has these two"),
        ({"model_init_kwargs": {"quantization_config": 1}}, "attn_implementation, dtype"),
        ({"importance_sampling_level": "sequence", "delta": 3.0}, "leave it out"),
    ],
)
def test_mistakes_are_answered(arguments, says):
    with pytest.raises((ValueError, TypeError), match=re.escape(says)):
        PAPOConfig("out", use_cpu=True, **arguments)


def test_prompts_get_their_markers():
    parts = [{"type": "image"}, {"type": "text", "text": "Add."}]
    assert marked("Add.", 2) == "<image><image>Add."
    assert marked("See <image>: add.", 1) == "See <image>: add."
    assert marked([{"role": "system", "content": "Be short."}, {"role": "user", "content": "Add."}], 1) == [
        {"role": "system", "content": "Be short."}, {"role": "user", "content": "<image>Add."},
    ]  # fmt: skip
    assert marked([{"role": "user", "content": parts}], 1) == [{"role": "user", "content": "<image>Add."}]
    with pytest.raises(ValueError, match="belong into the column"):
        marked([{"role": "user", "content": [{"type": "image", "image": b"x"}]}], 1)


def test_datasets_are_stored_once_with_all_columns(assets, tmp_path):
    picture = load_dataset("parquet", data_files=str(assets / "train.parquet"), split="train")[0]["images"][0]
    rows = Dataset.from_list(
        [
            {"prompt": [SYSTEM, {"role": "user", "content": "Add."}], "image": picture, "solution": 14},
            {"prompt": [{"role": "user", "content": "1+1?"}], "image": None, "solution": None},
        ]
    )
    folder, column = store(rows.cast_column("image", Image()), str(tmp_path / "train"), "train_dataset")
    assert column == "image" and os.listdir(tmp_path) == ["train"]
    config = Config().data
    config.prompt_key, config.answer_key, config.image_key = PROMPT, ANSWER, "image"
    found = PromptRows(folder, "data.train_files", config)
    first = found.prompt_text(found[0])
    assert isinstance(first, Dialogue) and first.messages == [("system", "Be short."), ("user", "<image>Add.")]
    assert [found[i][ANSWER] for i in (0, 1)] == ["14", "-"]
    assert found.pictures(found[0])[0].size == found.pictures({"image": picture})[0].size and not found.pictures(
        found[1]
    )
    vision = VisionProcessor(str(assets / "model"), 784, 12544)
    text = vision.chat_text(first)
    assert text.index("system") < text.index("Be short.") < text.index("user") < text.index("Add.")
    with pytest.raises(ValueError, match="`prompt` is needed"):
        store([{"question": "?"}], str(tmp_path / "other"), "train_dataset")


@pytest.mark.parametrize("form", ["pil", "bytes", "path", "list of pil"])
def test_pictures_come_as_people_have_them(form, tmp_path):
    picture = PIL.Image.new("RGB", (56, 28), "red")
    picture.save(tmp_path / "a.png")
    value = {"pil": picture, "bytes": (tmp_path / "a.png").read_bytes(), "path": str(tmp_path / "a.png")}
    value["list of pil"] = [picture, picture]
    rows = [{"prompt": "Red?", "images": value[form]}, {"prompt": "1+1?", "images": None}]
    folder, column = store(rows, str(tmp_path / "train"), "train_dataset")
    config = Config().data
    config.prompt_key, config.answer_key, config.image_key = PROMPT, ANSWER, column
    found = PromptRows(folder, "data.train_files", config)
    seen = found.pictures(found[0])
    assert [one.size for one in seen] == [(56, 28)] * len(seen) and seen[0].getpixel((5, 5)) == (255, 0, 0)
    assert found[0][PROMPT] == "<image>" * len(seen) + "Red?" and not found.pictures(found[1])


def reward_inputs(folder: str, *responses: str) -> list[RewardInput]:
    return [
        RewardInput(
            response=r, response_length=2, ground_truth="-", uid=f"{folder}:{i % 2}#1", response_ids=[1, 2], step=4
        )
        for i, r in enumerate(responses)
    ]


def scores_of(functions: list, weights: list | None, folder: str, *responses: str) -> list[dict]:
    path = f"{folder}-{'-'.join(part.name for part in parts_of(functions, weights))}.pkl"
    save(parts_of(functions, weights), path)
    return asyncio.run(score(reward_inputs(folder, *responses), path))


def test_rewards_in_trls_signature(tmp_path):
    rows = [{"prompt": "Add.", "answer": 3}, {"prompt": "Count.", "answer": None}]
    folder, _ = store(rows, str(tmp_path / "train"), "train_dataset")
    bonus = 0.5

    def right(prompts, completions, answer, **kwargs):
        assert prompts == ["Add.", "Count."] and kwargs["trainer_state"].global_step == 4
        kwargs["log_metric"]("seen", len(completions))
        kwargs["log_extra"]("length", [len(c) for c in completions])
        return [None if a is None else bonus * float(str(a) in c) for a, c in zip(answer, completions, strict=True)]

    async def short(completion_ids):
        return [-len(ids) for ids in completion_ids]

    found = scores_of([right, short], [2.0, 0.1], folder, "3", "nothing")
    assert found == [
        {"overall": 2 * 0.5 - 0.2, "right": 0.5, "short": -2.0, "seen": 2.0, "length": 1.0},
        {"overall": -0.2, "right": None, "short": -2.0, "seen": 2.0, "length": 7.0},
    ]
    assert component_means(found)["right"] == 0.5
    only = scores_of([right], None, folder, "3", "nothing")
    assert only[1]["overall"] != only[1]["overall"], "nothing applies, so there is no score"

    def alone(completions):
        return [1.0]

    with pytest.raises(ValueError, match="alone returned 1 for 2 completions"):
        scores_of([alone], None, folder, "a", "b")


def test_messages_get_messages_and_own_functions_work_by_name(tmp_path):
    user = [{"role": "user", "content": "Add."}]
    folder, _ = store([{"prompt": user, "answer": "3"}] * 2, str(tmp_path / "train"), "train_dataset")

    def assistant(prompts, completions):
        assert prompts[0] == user and completions[1] == [{"role": "assistant", "content": "b"}]
        return [1, 0]

    own = REPOSITORY / "examples/reward_function/answer.py"
    found = scores_of([assistant, f"{own}:compute_score"], None, folder, "a", "b")
    assert [one["overall"] for one in found] == [1.0, 0.0] and found[0]["compute_score/format"] == 0.0
    with pytest.raises(ValueError, match="path/to/file.py:function"):
        parts_of("org/reward-model", None)
    with pytest.raises(ValueError, match="2 weights for 1"):
        parts_of(assistant, [1, 2])
    assert [part.name for part in parts_of([assistant, assistant], None)] == ["assistant", "assistant_1"]


SCRIPT = """
from datasets import load_dataset
from transformers import TrainerCallback
from {package} import PAPOConfig, PAPOTrainer

dataset = load_dataset("parquet", data_files=TRAIN, split="train")
dataset = dataset.rename_column("problem", "prompt").map(
    lambda row: {{"prompt": [{{"role": "user", "content": row["prompt"].replace("<image>", "")}}]}}
)

def accuracy_reward(completions, answer, **kwargs):
    return [float(a in c[0]["content"]) for c, a in zip(completions, answer)]

def length_reward(completion_ids, **kwargs):
    return [len(ids) / 24 for ids in completion_ids]

class Log(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        seen.append((state.global_step, logs["loss"], logs["reward"], logs["rewards/accuracy_reward/mean"]))

args = PAPOConfig(
    output_dir=OUTPUT, per_device_train_batch_size=8, gradient_accumulation_steps=2, num_generations=4,
    max_completion_length=16, max_steps=2, logging_steps=1, perception_loss_weight=0.02, mask_ratio=0.6,
    mask_type="patch", reward_weights=[1.0, 0.2], report_to="none", remove_unused_columns=False, bf16=False,
    gradient_checkpointing=False, learning_rate=1e-3, save_strategy="no",
)
trainer = PAPOTrainer(
    model=MODEL, reward_funcs=[accuracy_reward, length_reward], args=args, train_dataset=dataset, callbacks=[Log()]
)
trainer.train()
trainer.save_model(args.output_dir)
"""


def run_script(assets: Path, output: Path, **more: object) -> dict:
    names = {"TRAIN": str(assets / "train.parquet"), "MODEL": str(assets / "model"), "OUTPUT": str(output), "seen": []}
    space = {"__name__": "trl_script", **names, **more}
    exec(compile(textwrap.dedent(SCRIPT.format(package="papo")), "trl_script.py", "exec"), space)
    return space


@pytest.mark.run
def test_a_script_for_trl_runs_and_errors_come_with_their_own_traceback(assets, tmp_path, ray_cluster):
    """Three trainers in one process, in a Ray that was running and goes on."""
    import ray

    space = run_script(assets, tmp_path / "run")
    assert [entry[0] for entry in space["seen"]] == [1, 2]
    assert (tmp_path / "run/model.safetensors").is_file() and ray.is_initialized()
    assert [entry["step"] for entry in space["trainer"].state.log_history] == [1, 2]

    def broken(completions, **kwargs):
        raise ZeroDivisionError("in my own reward")

    class Callback(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            raise LookupError("in my own callback")

    args, rows = space["args"], space["dataset"]
    args.reward_weights = None
    args.output_dir = str(tmp_path / "reward")
    with pytest.raises(RewardError, match=r"(?s)test_python_api.py.*in broken.*ZeroDivisionError: in my own reward"):
        PAPOTrainer(space["MODEL"], broken, args, rows).train()
    args.output_dir = str(tmp_path / "callback")
    with pytest.raises(LookupError, match="in my own callback") as error:
        PAPOTrainer(
            space["MODEL"], lambda completions: [0.0] * len(completions), args, rows, callbacks=[Callback()]
        ).train()
    assert error.traceback[-1].name == "on_step_end"
    assert ray.is_initialized()


@pytest.mark.run
def test_api_and_command_line_give_equal_metrics_also_after_ctrl_c(assets, tmp_path, caplog, monkeypatch):
    monkeypatch.setenv(*ray_uses_it())
    monkeypatch.setenv("RAY_ADDRESS", shared_cluster())

    class Interrupt(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 1:
                os.kill(os.getpid(), signal.SIGINT)

    rows = load_dataset("parquet", data_files=str(assets / "train.parquet"), split="train")
    rows = [{"prompt": row["problem"], "images": row["images"], "answer": row["answer"]} for row in rows]
    rows += [{"prompt": "1+2?", "images": None, "answer": "3"}] * 4
    args = PAPOConfig(
        str(tmp_path / "api"), per_device_train_batch_size=16, num_generations=4, max_completion_length=8, max_steps=3,
        eval_strategy="steps", eval_steps=3, logging_steps=1, learning_rate=1e-3, use_cpu=True,
        overrides=["data.max_prompt_length=128"],
    )  # fmt: skip

    def coin(completion_ids, answer, **kwargs):
        return [float((sum(ids) + int(a)) % 2) for ids, a in zip(completion_ids, answer, strict=True)]

    trainer = PAPOTrainer(str(assets / "model"), coin, args, rows, rows[:8], callbacks=[Interrupt()])
    with caplog.at_level(logging.WARNING):
        ended = trainer.train()
    assert (ended.global_step, "interrupted" in ended.metrics) == (1, True) and "goes on from there" in caplog.text
    start = trainer.evaluate()
    trainer.callbacks.clear()
    assert trainer.train().global_step == 3
    logged = trainer.state.log_history
    assert [entry["step"] for entry in logged if "loss" in entry] == [1, 2, 3]
    assert trainer.evaluate()["eval_reward"] == pytest.approx(logged[-1]["eval_reward"], abs=1e-9)
    assert start.keys() >= {"eval_reward", "eval_coin"}
    (tmp_path / "preset.yaml").write_text(trainer.to_preset())
    command = [*warm_python(), "-m", "verl.trainer.main", "--config-dir", str(tmp_path), "--config-name", "preset"]
    command += [f"trainer.output_dir={tmp_path / 'cli'}", *args.overrides]
    done = subprocess.run(command, cwd=REPOSITORY, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    assert numbers(tmp_path / "api") == numbers(tmp_path / "cli")


@pytest.mark.run
def test_the_example_runs(assets, tmp_path, monkeypatch):
    """Two steps of examples/python_api.py, as a person starts it."""
    monkeypatch.setenv(*ray_uses_it())
    monkeypatch.setenv("RAY_ADDRESS", shared_cluster())
    (tmp_path / "data").mkdir()
    (tmp_path / "model").symlink_to(assets / "model")
    for name in ("train.parquet", "val.parquet"):
        table = pq.read_table(assets / name)
        pq.write_table(pa.concat_tables([table, table]), tmp_path / "data" / name)  # as many rows as a step takes
    command = [*warm_python(), "examples/python_api.py", "--assets", str(tmp_path), "--steps", "2"]
    command += ["--output-dir", str(tmp_path / "run")]
    done = subprocess.run(command, cwd=REPOSITORY, env=os.environ | ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0 and "right on unseen pictures" in done.stdout, done.stderr[-3000:]

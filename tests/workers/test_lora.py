"""Low-rank adapters: what is trained, what engines and folders get, and the reference, which is the model without."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from tests.fakes.actors import build_actor, log_probs, on_ranks, process_group, update, weights
from tests.fakes.cluster import read_prompts, requests, start_cluster
from tests.fakes.families import VISION
from tests.fakes.rollouts import make_batch
from tests.workers.test_dp_actor import assert_same, definition
from verl.algorithms.losses.entropy import EntropyTermConfig
from verl.config.worker import LoRAConfig, ModelConfig
from verl.data.collate import join_responses
from verl.data.vision import load_special_tokens
from verl.models.adapter_names import is_adapter
from verl.models.forward import TOKENS
from verl.models.loading import load_model, outline
from verl.models.lora import adapter_off, adapter_parameters, find_targets
from verl.workers.fsdp.export import plain_weights, save_huggingface

LORA = LoRAConfig(rank=4, alpha=8)
NEEDS_VLLM = pytest.mark.vllm
# Head of its own, tied with deepstack, linear attention, a projector beside the tower, tied without images.
FAMILIES = ("qwen2_5_vl", "qwen3_vl", "qwen3_5", "internvl", "qwen2")
LANGUAGE = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
LINEAR = {"in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"}  # of linear attention


def language_layers(model_type: str) -> tuple[set[str], int]:
    """The names and the number of linear layers in the language model, of three blocks."""
    return (LANGUAGE | LINEAR, 2 * 8 + 7) if model_type == "qwen3_5" else (LANGUAGE, 3 * 7)


def read(folder, model_type: str, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    auto = AutoModelForImageTextToText if model_type in VISION else AutoModelForCausalLM
    return auto.from_pretrained(folder, dtype=dtype)


def with_adapter(folder, saved, model_type: str) -> torch.nn.Module:
    """The untouched model in float64 with the saved adapter, as peft loads it."""
    return PeftModel.from_pretrained(read(folder, model_type), saved / "adapter", is_trainable=True).double()


def reference(actor, batch) -> torch.Tensor:
    with adapter_off(actor.policy.inner):
        return log_probs(actor.policy, batch)


def plain_log_probs(plain, model, batch, row: int) -> torch.Tensor:
    """Log-probs of one response by a Hugging Face model on this row alone."""
    ids = batch["input_ids"][row][batch["attention_mask"][row].bool()]
    inputs = batch["mm_inputs"][row].tensors()
    if inputs:
        inputs["mm_token_type_ids"] = (ids == plain.config.image_token_id).int()[None]
    logits = plain(input_ids=ids[None], **inputs).logits[0, :-1].clone()
    logits[:, list(load_special_tokens(str(model)).banned)] = float("-inf")
    length = int(batch["response_mask"][row].sum())
    return torch.log_softmax(logits, -1).gather(-1, ids[1:, None])[-length:, 0]


TERMS = {"entropy": EntropyTermConfig(coef=1.0)}  # -log π, averaged over tokens


def _train_on_rank(rank, folders, saved):
    """Two updates of one of two ranks, what is saved and sent then, and the gradient of a third update."""
    found = {}
    for model_type, folder in folders.items():
        # Both ranks' first mini-batches, then their second; the first rank has no image in either.
        batch = make_batch(folder).chunk(2)[rank]
        actor = build_actor(folder / "model", terms=TERMS, live=False, lr=0.3, lora=LORA)
        start, start_reference = log_probs(actor.policy, batch), reference(actor, batch)
        initial = weights(actor)
        update(actor, batch, 2)
        result = {"start": start, "start_reference": start_reference, "initial": initial, "moved": weights(actor)}
        result |= {"trained": log_probs(actor.policy, batch), "reference": reference(actor, batch)}
        result["sent"] = {name: weight.whole() for name, weight in plain_weights(actor.policy.inner).items()}
        save_huggingface(actor.policy, ModelConfig(str(folder / "model")), str(saved / model_type))
        update(actor, batch, 1)
        after = weights(actor)
        result["gradient"] = {name: (result["moved"][name] - after[name]) / 0.3 for name in after}
        found[model_type] = result
    return found


@pytest.fixture(scope="module")
def trained(families, tmp_path_factory):
    """(folder of what was saved, results by rank)."""
    saved = tmp_path_factory.mktemp("saved")
    return saved, on_ranks(2, _train_on_rank, {name: families[name] for name in FAMILIES}, saved)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_two_ranks_move_adapters_alone_and_alike(trained, families, model_type):
    _, ranks = trained
    untouched = read(families[model_type] / "model", model_type, torch.float32).state_dict()
    for result in (rank[model_type] for rank in ranks):
        for name, weight in result["moved"].items():
            assert torch.equal(weight, ranks[0][model_type]["moved"][name])
            if is_adapter(name):
                assert not torch.equal(weight, result["initial"][name])
            else:
                assert torch.equal(weight, untouched[name.replace(".base_layer.", ".")])


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_gradient_is_that_of_the_plain_peft_model(trained, families, model_type):
    saved, ranks = trained
    folder = families[model_type]
    batch, plain = make_batch(folder), with_adapter(folder / "model", saved / model_type, model_type)
    losses = [-plain_log_probs(plain, folder / "model", batch, row) for row in range(len(batch))]
    torch.cat(losses).mean().backward()
    expected = {n.removeprefix("base_model.model."): p.grad for n, p in plain.named_parameters() if is_adapter(n)}
    assert len(expected) == 2 * language_layers(model_type)[1] and all(
        gradient.abs().max() > 0 for gradient in expected.values()
    )
    for rank in ranks:
        assert_same(rank[model_type]["gradient"], expected, tolerance=1e-5)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_reference_is_the_policy_at_the_start_and_the_original_model_ever_after(trained, families, model_type):
    _, ranks = trained
    folder = families[model_type]
    for rank, result in enumerate(r[model_type] for r in ranks):
        assert torch.equal(result["start"], result["start_reference"])
        assert torch.equal(result["reference"], result["start"])
        assert (result["trained"] - result["start"]).abs().max() > 0.1
        with process_group():
            original = build_actor(folder / "model")
            expected = log_probs(original.policy, make_batch(folder).chunk(2)[rank])
        torch.testing.assert_close(result["reference"], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_is_sent_and_saved_is_what_peft_merges(trained, families, model_type):
    saved, ranks = trained
    folder = families[model_type]
    plain = read(folder / "model", model_type)
    shapes = {name: weight.shape for name, weight in plain.state_dict().items()}
    merged = with_adapter(folder / "model", saved / model_type, model_type).merge_and_unload().state_dict()
    again = read(saved / model_type, model_type, torch.float32).state_dict()
    assert again.keys() == merged.keys()
    for rank in ranks:
        sent = rank[model_type]["sent"]
        assert {name: weight.shape for name, weight in sent.items()} == shapes and list(sent) == list(shapes)
        for name, weight in merged.items():
            torch.testing.assert_close(sent[name].double(), weight, atol=1e-6, rtol=0)
            assert torch.equal(again[name], sent[name])
    moved = {name for name, weight in merged.items() if (weight != plain.state_dict()[name]).any()}
    assert {name.split(".")[-2] for name in moved} == language_layers(model_type)[0]
    assert not any("vis" in name for name in moved)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_both_saved_forms_have_the_trainers_log_probs(trained, families, model_type):
    saved, ranks = trained
    folder = families[model_type]
    batch = make_batch(folder)
    found = torch.cat([rank[model_type]["trained"] for rank in ranks])
    close = 2e-5 if model_type == "qwen3_5" else 1e-5  # the state of linear attention rounds once more
    for plain in (
        read(saved / model_type, model_type, torch.float32),
        with_adapter(folder / "model", saved / model_type, model_type).float(),
    ):
        for row in (0, 4, 7):
            expected = plain_log_probs(plain, folder / "model", batch, row)
            torch.testing.assert_close(found[row, : len(expected)], expected, atol=close, rtol=0)


@pytest.fixture
def one_rank():
    with process_group():
        yield


def test_the_gradient_of_papos_objective_through_a_live_view_and_checkpoints(assets, one_rank, tmp_path):
    """All of it, with the embeddings and the vision tower, which come first, frozen."""
    model, batch = assets / "model", make_batch(assets)
    actor = build_actor(model, lora=LORA, enable_gradient_checkpointing=True, freeze_vision_tower=True)
    update(actor, batch, 1)
    save_huggingface(actor.policy, ModelConfig(str(model)), str(tmp_path / "saved"))
    before = weights(actor)
    update(actor, batch, 1)
    after = weights(actor)
    plain = with_adapter(model, tmp_path / "saved", "qwen2_5_vl")
    plain.config = plain.base_model.model.config
    expected, _ = definition(model, batch, plain=plain)
    expected = {n.removeprefix("base_model.model."): g for n, g in expected.items() if is_adapter(n)}
    assert_same({name: before[name] - after[name] for name in before}, expected, tolerance=1e-5)


@pytest.mark.parametrize("reshard", [True, False])
def test_a_pass_of_the_reference_leaves_adapters_trainable(assets, one_rank, reshard):
    """Also where FSDP keeps what it has gathered in that pass."""
    batch = make_batch(assets)
    actor = build_actor(assets / "model", lora=LORA, reshard_after_forward=reshard)
    before = weights(actor)
    for _ in range(2):
        reference(actor, batch)
        update(actor, batch, 1)
    moved = {name for name, weight in weights(actor).items() if not torch.equal(weight, before[name])}
    assert moved == {name for name in before if is_adapter(name)}


def test_adapters_are_float32_over_a_base_in_the_compute_dtype(assets, one_rank, tmp_path):
    batch = make_batch(assets)
    exact, rounded = (
        build_actor(assets / "model", compute_dtype=dtype, **options)
        for dtype, options in (("bfloat16", {}), ("bfloat16", {"lora": LORA}))
    )
    # The frozen weights are those that float32 weights are cast to for every forward.
    assert torch.equal(log_probs(exact.policy, batch), log_probs(rounded.policy, batch))
    assert update(rounded, batch, 1).result()["actor/skipped_frac"] == 0
    for name, weight in weights(rounded).items():
        assert weight.dtype == (torch.float32 if is_adapter(name) else torch.bfloat16), name
    merged = next(w for n, w in plain_weights(rounded.policy.inner).items() if n.endswith("q_proj.weight"))
    assert merged.whole().dtype == torch.float32  # it is rounded once, with the adapter in it
    save_huggingface(rounded.policy, ModelConfig(str(assets / "model")), str(tmp_path / "saved"))
    saved = AutoModelForImageTextToText.from_pretrained(tmp_path / "saved")
    assert {weight.dtype for weight in saved.parameters()} == {torch.float32}


def _with_the_tower(rank, folders, lora):
    """Which weights move on one of two ranks, of which the first has no image."""
    found = {}
    for model_type, folder in folders.items():
        actor = build_actor(folder / "model", terms=TERMS, live=False, lora=lora)
        before = weights(actor)
        for _ in range(2):
            update(actor, make_batch(folder).chunk(2)[rank], 1)
        found[model_type] = {n for n, w in weights(actor).items() if not torch.equal(w, before[n])}
    return found


def test_adapters_in_the_vision_tower_where_they_are_asked_for(families):
    lora = LoRAConfig(rank=2, target_modules=["q_proj", "qkv"], vision_tower=True)
    folders = {name: families[name] for name in ("qwen2_5_vl", "qwen3_vl")}
    ranks = on_ranks(2, _with_the_tower, folders, lora)
    for model_type in folders:
        assert ranks[0][model_type] == ranks[1][model_type]
        layers = {name.split(".lora_")[0] for name in ranks[0][model_type]}
        assert sum("visual" in name for name in layers) == 3 and len(layers) == 6


@pytest.mark.parametrize("model_type", FAMILIES)
def test_all_linear_layers_are_those_of_the_language_model(families, model_type):
    inner = load_model(str(families[model_type] / "model"), torch.float32)
    found = find_targets(inner, LORA)
    names, count = language_layers(model_type)
    assert len(found) == count and {name.rpartition(".")[2] for name in found} == names
    assert not any("vis" in name or "projector" in name or "lm_head" in name for name in found)
    assert adapter_parameters(outline(inner.config), LORA) == 4 * sum(
        sum(inner.get_submodule(name).weight.shape) for name in found
    )
    # Names that both towers have mean the language model's, and an expression can say which of them.
    by_name = find_targets(inner, LoRAConfig(rank=1, target_modules=["gate_proj", "self_attn.v_proj"]))
    assert {name.rpartition(".")[2] for name in by_name} == {"gate_proj", "v_proj"}
    assert len(by_name) == (4 if model_type == "qwen3_5" else 6)
    assert find_targets(inner, LoRAConfig(rank=1, target_modules="o_proj")) == [n for n in found if ".o_proj" in n]
    second = find_targets(inner, LoRAConfig(rank=1, target_modules=r".*\.layers\.1\..*_proj"))
    assert len(second) == 7 and all(".layers.1." in name for name in second)


@pytest.mark.parametrize(
    ("model_type", "options", "message"),
    [
        ("qwen2_5_vl", {"target_modules": ["q_proj", "c_attn"]}, "'c_attn' matches no linear layer; there are down_"),
        ("qwen2_5_vl", {"target_modules": ["lm_head"]}, "'lm_head' matches no linear layer"),
        ("qwen2_5_vl", {"target_modules": ["embed_tokens"]}, "'embed_tokens' matches no linear layer"),
        ("qwen2_5_vl", {"target_modules": ["qkv"]}, r"'qkv' is in the vision tower alone \(model.visual.blocks.0.attn"),
        ("qwen3_vl", {"target_modules": ".*visual.*"}, r"vision tower alone.*lora.vision_tower=true"),
        ("qwen2", {"vision_tower": True}, "vision_tower=true: a qwen2 model has none"),
    ],
)
def test_targets_that_are_not_there_are_refused_by_name(families, model_type, options, message):
    inner = load_model(str(families[model_type] / "model"), torch.float32, empty=True)
    with pytest.raises(ValueError, match=f"worker.actor.model.lora.*{message}"):
        find_targets(inner, LoRAConfig(rank=1, **options))


@pytest.mark.parametrize("engine", ["hf", pytest.param("vllm", marks=NEEDS_VLLM)])
def test_engines_agree_with_the_trainer_after_a_merged_sync(families, ray_cluster, engine):
    folder = families["qwen3_vl"]  # a tied head, and pictures that enter deeper layers
    overrides = [f"worker.rollout.name={engine}", "worker.actor.model.lora.rank=4", "worker.actor.model.lora.alpha=32"]
    cluster = start_cluster(folder / "model", str(folder / "train.parquet"), *overrides)
    before, prompts = cluster.weights(), read_prompts(cluster)
    cluster.train(folder)
    responses, differences = cluster.generate(prompts, requests(4)), []
    for _ in range(2):
        batch = join_responses(prompts, responses, 3).select([*TOKENS, "mm_inputs"])
        trainer = cluster.log_probs(batch)
        differences.append((trainer - responses["rollout_log_probs"]).abs().max().item())
        cluster.rollout.sync_weights(cluster.actor)
        responses = cluster.generate(prompts, requests(4))
    after = cluster.weights()
    cluster.stop()
    assert differences[0] > 0.05 and differences[1] < 1e-4
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.split(".")[-2] for name in moved} == LANGUAGE and len(moved) == 7 * 3

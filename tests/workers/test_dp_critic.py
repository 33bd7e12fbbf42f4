"""The critic against its definition: values, the gradient of its loss, and what neither may depend on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForImageTextToText

from tests.fakes.actors import MAX_RESPONSE_LENGTH, even, on_ranks, process_group
from tests.fakes.critics import CLIP, build_critic, plain_values
from tests.fakes.rollouts import make_batch
from tests.fakes.rows import row, write_parquet
from verl.algorithms.losses.value import explained_variance, value_loss
from verl.config.algorithm import LossAverage
from verl.metrics.bag import MetricBag
from verl.models.value import ValueModel
from verl.protocol import DataProto
from verl.workers.fsdp.wrap import whole
from verl.workers.training.dp_critic import DataParallelCritic


@pytest.fixture(scope="module")
def batch(assets, tmp_path_factory):
    """Text-only, one-image and two-image prompts; the first half has no image at all."""
    rows = [row("1+1?", images=0), row("2+3?", images=0), row(), row("<image>+<image>", images=2)]
    made = make_batch(assets, write_parquet(tmp_path_factory.mktemp("mixed") / "a.parquet", rows))
    generator = torch.Generator().manual_seed(0)
    mask = made["response_mask"]
    old, returns = (torch.randn(mask.shape, generator=generator) * 0.1 * mask for _ in range(2))
    return made.with_columns({"values": old, "returns": returns})


def weights(critic: DataParallelCritic) -> dict[str, torch.Tensor]:
    return {name: whole(weight).detach().clone() for name, weight in critic.model.state_dict().items()}


def gradient(model: Path, batch: DataProto, mini_batches: int = 1, **options) -> dict[str, torch.Tensor]:
    critic = build_critic(model, **options)
    before = weights(critic)
    critic.update_critic(batch, even(batch, mini_batches))
    after = weights(critic)
    return {name: before[name] - after[name] for name in before}


def on_one_of_ranks(rank: int, models: list[Path], shards: list[DataProto]) -> list[tuple]:
    """For each model, the values and the gradient of one of two ranks."""
    rows = shards[rank]
    return [(build_critic(model).compute_values(rows), gradient(model, rows)) for model in models]


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    largest = max(grad.abs().max() for grad in expected.values())
    assert largest > 0 and found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            found[name].double(), expected[name].double(), atol=float(tolerance * largest), rtol=0, msg=name
        )


def test_a_new_critic_expects_nothing(assets, batch):
    with process_group():
        assert (build_critic(assets / "model", wrap=ValueModel).compute_values(batch) == 0).all()


def test_values_are_those_of_the_plain_model_before_each_token(model, batch):
    with process_group():
        values = build_critic(model).compute_values(batch)
    _, expected = plain_values(AutoModelForImageTextToText.from_pretrained(model), batch)
    assert values.shape == batch["response_mask"].shape and values.abs().max() > 0.01
    for i, own in enumerate(expected):
        torch.testing.assert_close(values[i, : len(own)].double(), own.detach(), atol=1e-5, rtol=0)
        assert (values[i, len(own) :] == 0).all()


@pytest.mark.parametrize("average", list(LossAverage))
def test_the_gradient_is_that_of_the_definition(model, batch, average):
    critic, found = plain_values(AutoModelForImageTextToText.from_pretrained(model), batch)
    losses, clipped = [], 0
    for i, values in enumerate(found):
        own = []
        for t, value in enumerate(values):
            old, target = batch["values"][i, t].double(), batch["returns"][i, t].double()
            bound = old + (value - old).clamp(-CLIP, CLIP)
            clipped += bool((bound - target) ** 2 > (value - target) ** 2)
            own.append(torch.maximum((value - target) ** 2, (bound - target) ** 2) / 2)
        losses.append(torch.stack(own))
    tokens = int(batch["response_mask"].sum())
    assert 0 < clipped < tokens  # both branches are taken
    {
        LossAverage.token: torch.cat(losses).mean(),
        LossAverage.seq: torch.stack([own.mean() for own in losses]).mean(),
        LossAverage.seq_sum: torch.stack([own.sum() for own in losses]).mean() / MAX_RESPONSE_LENGTH,
    }[average].backward()
    expected = {name: weight.grad for name, weight in critic.named_parameters()}  # of every weight: none is idle
    with process_group():
        assert_same(gradient(model, batch, loss_avg_mode=average), expected, 1e-5)


@pytest.mark.parametrize("average", list(LossAverage))
@pytest.mark.parametrize("budget", [1, 150])
def test_the_split_into_micro_batches_does_not_matter(assets, batch, budget, average):
    options = {"loss_avg_mode": average, "max_tokens_per_micro_batch": budget}
    with process_group():
        expected = gradient(assets / "model", batch, loss_avg_mode=average)
        assert_same(gradient(assets / "model", batch, **options), expected, 2e-6)
        cut, whole = build_critic(assets / "model", **options), build_critic(assets / "model", loss_avg_mode=average)
        metrics = whole.update_critic(batch, even(batch, 1)).result()
        assert cut.update_critic(batch, even(batch, 1)).result() == pytest.approx(metrics, rel=1e-5)
    names = ("vf_loss", "vf_clip_frac", "value", "return", "grad_norm", "lr", "skipped_frac")
    assert metrics.keys() == {f"critic/{name}" for name in names}


def test_mini_batches_and_epochs_are_updates_of_their_own(assets, batch):
    with process_group():
        found = gradient(assets / "model", batch, mini_batches=2, ppo_epochs=2, lr=0.1)
        critic = build_critic(assets / "model", lr=0.1)
        before = weights(critic)
        for half in batch.chunk(2) * 2:
            critic.update_critic(half, even(half, 1))
        after = weights(critic)
    assert critic.schedule.last_epoch == 4
    assert_same(found, {name: before[name] - after[name] for name in before}, 1e-4)


def test_order_of_rows_does_not_matter(assets, batch):
    order = torch.randperm(len(batch), generator=torch.Generator().manual_seed(1))
    with process_group():
        assert_same(gradient(assets / "model", batch.rows(order)), gradient(assets / "model", batch), 2e-6)


def test_two_ranks_one_of_them_without_images_have_the_values_and_the_gradient_of_one(assets, tied_model, batch):
    models = [assets / "model", tied_model]
    ranks = on_ranks(2, on_one_of_ranks, models, batch.chunk(2))
    for model, *found in zip(models, *ranks, strict=True):
        with process_group():
            values, expected = build_critic(model).compute_values(batch), gradient(model, batch)
        torch.testing.assert_close(torch.cat([own for own, _ in found]), values, atol=1e-5, rtol=0)
        for _, own in found:
            assert_same(own, expected, 5e-6)


def test_updates_bring_values_to_their_returns(assets, batch):
    with process_group():
        critic = build_critic(assets / "model", wrap=ValueModel, lr=0.01, cliprange_value=10.0)
        losses = [critic.update_critic(batch, even(batch, 1)).result()["critic/vf_loss"] for _ in range(6)]
    assert losses[-1] < 0.97 * losses[0]


def test_the_head_stays_float32_under_a_bfloat16_body(assets, batch):
    seen = []
    with process_group():
        critic = build_critic(assets / "model", dtype="bfloat16")
        critic.model.value_head.register_forward_hook(lambda m, given, out: seen.append((m.weight.dtype, out.dtype)))
        values = critic.compute_values(batch)
        precise = build_critic(assets / "model").compute_values(batch)
    assert set(seen) == {(torch.float32, torch.float32)}
    assert 0 < (values - precise).abs().max() < 0.05


def test_an_update_that_is_not_finite_is_dropped_and_too_many_end_the_run(assets, batch):
    broken = batch.with_columns({"returns": torch.full_like(batch["returns"], float("nan"))})
    with process_group():
        critic = build_critic(assets / "model", max_skipped_updates=2)
        before = weights(critic)
        metrics = critic.update_critic(broken, even(broken, 1)).result()
        assert metrics["critic/skipped_frac"] == 1 and metrics["critic/nonfinite/value"] == 1
        assert all(torch.equal(before[name], after) for name, after in weights(critic).items())
        with pytest.raises(RuntimeError, match="worker.critic.max_skipped_updates"):
            critic.update_critic(broken, even(broken, 1))


def test_value_loss_by_hand():
    """Inside the clip; past it, towards the target (the clip decides, no gradient); past it, away from the target."""
    values = torch.tensor([[0.1, 1.0, 1.0]], requires_grad=True)
    losses, clipped = value_loss(values, torch.zeros(1, 3), torch.tensor([[0.3, 2.0, -1.0]]), 0.5)
    torch.testing.assert_close(losses, torch.tensor([[0.02, 1.125, 2.0]]))
    assert clipped.tolist() == [[0, 1, 0]]
    losses.sum().backward()
    torch.testing.assert_close(values.grad, torch.tensor([[-0.2, 0.0, 2.0]]))


@pytest.mark.parametrize(
    ("values", "expected"),
    [([0, 1, 2], 1), ([5, 6, 7], 1), ([1, 1, 1], 0), ([0, 2, 4], 0), ([2, 1, 0], -3), ([0, 0.5, 1], 0.75)],
)
def test_explained_variance_by_hand(values, expected):
    values, returns = torch.tensor([[*map(float, values), 99.0]]), torch.tensor([[0.0, 1.0, 2.0, -99.0]])
    metrics = MetricBag()
    metrics.add("explained", *explained_variance(values, returns, torch.tensor([[1, 1, 1, 0]])))
    assert metrics.result()["explained"] == pytest.approx(expected)


@pytest.mark.parametrize("mask", [[1, 1, 1, 0], [0, 0, 0, 0]])
def test_returns_that_do_not_vary_leave_nothing_to_explain(mask):
    metrics = MetricBag()
    values, returns = torch.tensor([[0.0, 3.0, 1.0, 0.0]]), torch.tensor([[0.1, 0.1, 0.1, 5.0]])
    metrics.add("explained", *explained_variance(values, returns, torch.tensor([mask])))
    assert metrics.result() == {}

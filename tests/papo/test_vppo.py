"""VPPO's shaping of advantages against plain Python, and what it must not depend on."""

from __future__ import annotations

import math

import pytest
import torch

from papo.shaping import TokensConfig, tokens
from papo.terms import largest_tokens
from verl.algorithms.losses.estimators import k3


def columns(rows: int = 6, width: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    lengths = torch.tensor([5, 4, 3, 1, 0, 5])[:rows]
    mask = (torch.arange(width) < lengths[:, None]).long()
    old, masked = (-torch.rand(rows, width, generator=generator) * mask for _ in range(2))
    advantages = torch.randn(rows, 1, generator=generator) * mask
    seen = torch.tensor([True, True, True, True, True, False])[:rows]
    return {
        "old_log_probs": old,
        "masked_log_probs": masked,
        "masked_rows": seen,
        "response_mask": mask,
        "advantages": advantages,
    }


def vppo(given: dict[str, torch.Tensor], top_fraction: float = 0.4, min_scale: float = 0.9):
    """The setting of the preset."""
    return tokens(given, TokensConfig(score="kl", top_fraction=top_fraction, min_scale=min_scale))


def by_hand(found: dict[str, torch.Tensor], fraction: float, least: float) -> list[list[float]]:
    kl, mean = {}, {}
    for row in range(len(found["masked_rows"])):
        length = int(found["response_mask"][row].sum())
        ratios = (found["masked_log_probs"][row] - found["old_log_probs"][row]).double().tolist()[:length]
        kl[row] = [math.exp(r) - r - 1 for r in ratios]
        if found["masked_rows"][row] and length:
            mean[row] = sum(kl[row]) / length
    low, high = min(mean.values()), max(mean.values())
    x = {row: (value - low) / (high - low) for row, value in mean.items()}
    highest = least + (1 - least) / (sum(x.values()) / len(x))
    result = []
    for row, advantages in enumerate(found["advantages"].tolist()):
        if not found["masked_rows"][row]:
            result.append(advantages)
            continue
        keep = sorted(range(len(kl[row])), key=lambda t: -kl[row][t])[: math.ceil(fraction * len(kl[row]))]
        scale = least + x.get(row, 0) * (highest - least)
        result.append([scale * a if t in keep else 0.0 for t, a in enumerate(advantages)])
    return result


@pytest.mark.parametrize(("fraction", "least"), [(0.4, 0.9), (1.0, 0.5), (0.01, 1.0)])
def test_the_definition_row_by_row(fraction, least):
    given = columns()
    shaped, metrics = vppo(given, fraction, least)
    torch.testing.assert_close(shaped.double(), torch.tensor(by_hand(given, fraction, least)).double())
    assert shaped.dtype == torch.float32
    assert metrics["scale_max"] >= 1


def test_the_factors_have_mean_one_and_rows_without_an_image_are_left_alone():
    given = columns() | {"advantages": columns()["response_mask"].float()}
    shaped, _ = vppo(given, 1.0)
    assert shaped[:4, 0].mean().item() == pytest.approx(1.0)
    assert torch.equal(shaped[5], given["advantages"][5])


def test_responses_that_depend_alike_are_not_scaled():
    given = columns()
    given["masked_log_probs"] = given["old_log_probs"] - 0.5 * given["response_mask"]
    shaped, metrics = vppo(given, 1.0)
    torch.testing.assert_close(shaped, given["advantages"])
    assert metrics["scale_max"] == 1.0


def test_order_of_rows_does_not_matter():
    given, order = columns(), torch.tensor([3, 5, 0, 4, 2, 1])
    shaped, _ = vppo(given)
    moved, _ = vppo({name: column[order] for name, column in given.items()})
    torch.testing.assert_close(shaped[order], moved)


def test_a_step_without_any_image_stays_as_it_is():
    given = columns() | {"masked_rows": torch.zeros(6, dtype=torch.bool)}
    shaped, metrics = vppo(given)
    assert torch.equal(shaped, given["advantages"]) and metrics["score"] == 0.0


def plain_vppo(given: dict[str, torch.Tensor], top_fraction: float, min_scale: float) -> torch.Tensor:
    """VPPO alone, in the order of operations in which it was first written here."""
    mask, seen, advantages = given["response_mask"].bool(), given["masked_rows"], given["advantages"]
    values = torch.where(mask, k3(given["old_log_probs"], given["masked_log_probs"]), 0.0)
    scale = torch.ones(len(values), dtype=torch.float64)
    dependency = values.double().sum(-1) / mask.sum(-1).clamp(min=1)
    compared = seen & mask.any(-1)
    least, largest = dependency[compared].min(), dependency[compared].max()
    x = (dependency[compared] - least) / (largest - least)
    scale[compared] = min_scale + x * (1 - min_scale) / x.mean()
    chosen = largest_tokens(values, mask, top_fraction)
    shaped = torch.where(chosen, advantages * scale.float()[:, None], 0.0)
    return torch.where(seen[:, None], shaped, advantages)


@pytest.mark.parametrize(("fraction", "least"), [(0.4, 0.9), (1.0, 0.5), (0.7, 0.0)])
def test_a_setting_of_the_shaper_is_vppo_to_the_last_bit(fraction, least):
    given = columns()
    assert torch.equal(vppo(given, fraction, least)[0], plain_vppo(given, fraction, least))

"""Scores, selections and weights of tokens against formulas written here on their own, in float64."""

from __future__ import annotations

import math

import pytest
import torch

from papo.shaping import READS, Score, TokensConfig, Weight, score_of, tokens
from verl.algorithms.requirements import requirements_of
from verl.algorithms.shapers import SHAPERS
from verl.config.compose import compose_config
from verl.models.log_probs import chunked_entropy, chunked_jsd, chunked_kl

B, T, V = 4, 10, 6
LENGTHS = [10, 7, 1, 0]


@pytest.fixture(scope="module")
def distributions() -> tuple[torch.Tensor, torch.Tensor]:
    """Next-token distributions [B, T, V] with the image and without it."""
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(2, B, T, V, generator=generator, dtype=torch.float64) * 2
    return logits[0].softmax(-1), (logits[0] + 0.7 * logits[1]).softmax(-1)


@pytest.fixture(scope="module")
def columns(distributions) -> dict[str, torch.Tensor]:
    real, masked = distributions
    chosen = torch.randint(V, (B, T, 1), generator=torch.Generator().manual_seed(3))
    mean = (real + masked) / 2
    return {
        "response_mask": (torch.arange(T) < torch.tensor(LENGTHS)[:, None]).long(),
        "old_log_probs": real.log().gather(-1, chosen)[..., 0],
        "masked_log_probs": masked.log().gather(-1, chosen)[..., 0],
        "full_entropy": -(real * real.log()).sum(-1),
        "masked_full_entropy": -(masked * masked.log()).sum(-1),
        "masked_full_kl": (real * (real / masked).log()).sum(-1),
        "masked_full_jsd": ((real * (real / mean).log()).sum(-1) + (masked * (masked / mean).log()).sum(-1)) / 2,
        "masked_rows": torch.tensor([True, True, True, True]),
        "advantages": torch.randn(B, T, generator=torch.Generator().manual_seed(4), dtype=torch.float64),
    }


def by_hand(score: str, columns: dict[str, torch.Tensor], row: int) -> list[float]:
    """The scores of a response's tokens, one by one."""
    length = LENGTHS[row]

    def of(name: str) -> list[float]:
        return columns[name][row, :length].tolist()

    own, seen = of("old_log_probs"), of("masked_log_probs")
    kl = [math.exp(m - p) - (m - p) - 1 for p, m in zip(own, seen, strict=True)]
    change = [abs(a - b) for a, b in zip(of("full_entropy"), of("masked_full_entropy"), strict=True)]
    jsd, entropy, most = of("masked_full_jsd"), of("full_entropy"), max(change, default=1.0)
    return {
        "kl": kl,
        "log1p_kl": [math.log(1 + x) for x in kl],
        "log_prob_diff": [abs(p - m) for p, m in zip(own, seen, strict=True)],
        "full_kl": of("masked_full_kl"),
        "jsd": jsd,
        "entropy": entropy,
        "entropy_diff": change,
        "vision_entropy": [
            (1 - (1 - j / math.log(2)) * (1 - c / most)) * h for j, c, h in zip(jsd, change, entropy, strict=True)
        ],
    }[score]


@pytest.mark.parametrize("score", list(Score))
def test_scores_are_their_formulas(score, columns):
    found = score_of(score, columns, "masked")
    for row, length in enumerate(LENGTHS):
        assert found[row, :length].tolist() == pytest.approx(by_hand(score, columns, row), abs=1e-12)
        assert not found[row, length:].any()
    needed = set(SHAPERS["tokens"].requires(TokensConfig(score=score)))
    assert needed >= {"response_mask", "masked_rows"} and len(needed) == 2 + len(READS[score])
    score_of(score, {name: columns[name] for name in needed}, "masked")  # it reads no more than it says


@pytest.mark.parametrize("score", list(Score))
def test_the_largest_are_chosen_and_the_rest_has_no_advantage(score, columns):
    shaped, metrics = tokens(columns, TokensConfig(score=score, top_fraction=0.3))
    for row, length in enumerate(LENGTHS):
        values = by_hand(score, columns, row)
        kept = sorted(range(length), key=lambda t: -values[t])[: math.ceil(0.3 * length)]
        expected = [columns["advantages"][row, t].item() if t in kept else 0.0 for t in range(length)]
        assert shaped[row, :length].tolist() == pytest.approx(expected)
    assert metrics["weighted_fraction"] == pytest.approx((3 + 3 + 1) / 18)


def test_tor_weighs_what_only_the_second_score_chooses_by_half(columns):
    config = TokensConfig(score=Score.entropy, second_score=Score.log_prob_diff, second_weight=0.5)
    shaped, _ = tokens(columns, config)
    weights = shaped / columns["advantages"]
    for row, length in enumerate(LENGTHS[:2]):
        first, second = by_hand("entropy", columns, row), by_hand("log_prob_diff", columns, row)
        count = math.ceil(0.3 * length)
        opened = sorted(range(length), key=lambda t: -first[t])[:count]
        changed = sorted(range(length), key=lambda t: -second[t])[:count]
        expected = [1.0 if t in opened else 0.5 if t in changed else 0.0 for t in range(length)]
        assert weights[row, :length].tolist() == pytest.approx(expected) and 0.5 in expected


def test_pgpos_ramp(columns):
    shaped, metrics = tokens(columns, TokensConfig(score=Score.log1p_kl, weight=Weight.ramp))
    weights = shaped / columns["advantages"]
    for row, length in enumerate(LENGTHS[:2]):
        values = by_hand("log1p_kl", columns, row)
        place = [(v - min(values)) / (max(values) - min(values)) for v in values]
        raw = [x / 0.4 if x <= 0.4 else 1 + 2 * (x - 0.4) / 0.6 for x in place]
        assert weights[row, :length].tolist() == pytest.approx([w * length / sum(raw) for w in raw])
        assert weights[row, :length].sum().item() == pytest.approx(length)
    assert weights[2, 0].item() == pytest.approx(1.0), "a single token has nothing to be compared with"
    assert metrics["weight_max"] > 1


@pytest.mark.parametrize("config", [TokensConfig(), TokensConfig(score=Score.log1p_kl, weight=Weight.ramp)])
def test_rows_are_judged_alone_and_text_keeps_its_advantages(columns, config):
    order = torch.tensor([2, 0, 3, 1])
    shuffled = {name: column[order] for name, column in columns.items()}
    torch.testing.assert_close(tokens(shuffled, config)[0], tokens(columns, config)[0][order])
    text = {**columns, "masked_rows": torch.tensor([True, False, True, True])}
    shaped, _ = tokens(text, config)
    torch.testing.assert_close(shaped[1], columns["advantages"][1])
    torch.testing.assert_close(shaped[0], tokens(columns, config)[0][0])


def test_the_exact_columns_are_those_of_the_definition(distributions, columns):
    real, masked = (d.log().float().view(-1, V) for d in distributions)
    head = (lambda hidden: hidden, 1.0, torch.empty(0, dtype=torch.int64), 7)
    for name, found in (
        ("full_entropy", chunked_entropy(real, *head)),
        ("masked_full_kl", chunked_kl(real, masked, *head, detach_other=False)),
        ("masked_full_jsd", chunked_jsd(real, masked, *head)),
    ):
        torch.testing.assert_close(found.double().view(B, T), columns[name], atol=1e-6, rtol=1e-5)
    one = torch.tensor([[0.0, -40.0]])
    assert chunked_jsd(one, one.flip(-1), *head).item() == pytest.approx(math.log(2), abs=1e-6)
    banned = (lambda hidden: hidden, 1.0, torch.tensor([0]), 7)
    assert torch.isfinite(chunked_jsd(real, masked, *banned)).all()


@pytest.mark.parametrize(
    ("preset", "exact"),
    [("pgpo", ()), ("tor", ("full_entropy",)), ("vepo", ("full_entropy", "masked_full_entropy", "masked_full_jsd"))],
)
def test_a_pass_computes_what_the_presets_read(preset, exact, in_repository):
    config = compose_config(preset, ["+task=digits"])
    requirements = requirements_of(config.algorithm, 1)
    assert requirements.early_exact == exact and requirements.stored_views == ("masked",)
    assert not set(exact) & set(requirements.stored), "the update does not read them"


def test_a_ramp_has_no_second_choice():
    with pytest.raises(ValueError, match="chooses none"):
        TokensConfig(weight=Weight.ramp, second_score=Score.kl).check("algorithm.shapers.x")

"""Which passes run follows from the terms."""

from __future__ import annotations

import pytest

from papo.corruption.patches import RandomPatchConfig
from papo.terms import PerceptionKLConfig
from verl.algorithms.losses.compose import build_terms
from verl.algorithms.losses.entropy import EntropyEstimator, EntropyTermConfig
from verl.algorithms.losses.estimators import Estimator
from verl.algorithms.losses.policy import PolicyTermConfig
from verl.algorithms.losses.ref_kl import RefKLTermConfig
from verl.algorithms.requirements import find_requirements


def requirements(grad: bool = False, **terms):
    return find_requirements(build_terms(terms), {"masked": RandomPatchConfig(grad=grad)}, {})


def test_grpo_needs_the_old_policy_alone_and_a_kl_adds_the_reference():
    assert not requirements(policy=PolicyTermConfig()).reference
    found = requirements(policy=PolicyTermConfig(), ref_kl=RefKLTermConfig())
    assert found.old and found.reference and found.views == ()


def test_a_view_is_stored_or_live():
    terms = {"policy": PolicyTermConfig(), "kl": PerceptionKLConfig()}
    assert requirements(**terms).stored_views == ("masked",)
    assert requirements(grad=True, **terms).live_views == ("masked",)
    assert requirements(grad=True, **terms).stored_views == ()


def test_masked_entropy_without_gradient_is_inert_and_the_perception_kl_is_not():
    terms = {"kl": PerceptionKLConfig(), "masked_entropy": EntropyTermConfig(coef=0.05, view="masked")}
    assert requirements(**terms).inert == ("masked_entropy",)
    assert requirements(grad=True, **terms).inert == ()
    terms["masked_entropy"].coef = 0.0
    assert requirements(**terms).inert == ()


def test_a_term_over_a_view_that_is_not_declared_is_refused_by_name():
    with pytest.raises(ValueError, match="algorithm.terms.kl reads the column 'blurred_log_probs'"):
        requirements(kl=PerceptionKLConfig(view="blurred"))


def test_terms_over_the_whole_vocabulary_need_the_forward_of_the_update():
    full = {"kl": PerceptionKLConfig(estimator=Estimator.full)}
    with pytest.raises(ValueError, match="algorithm.terms.kl looks at the whole vocabulary.*masked.grad=true"):
        requirements(**full)
    full["entropy"] = EntropyTermConfig(coef=0.1, estimator=EntropyEstimator.full)
    found = requirements(grad=True, **full)
    assert found.exact == ("full_entropy", "masked_full_kl") and found.live_views == ("masked",) and not found.inert
    alone = requirements(entropy=EntropyTermConfig(coef=0.1, estimator=EntropyEstimator.full))
    assert alone.views == () and alone.inert == ()
    with pytest.raises(ValueError, match="reads the column 'blurred_full_kl'"):
        requirements(kl=PerceptionKLConfig(estimator=Estimator.full, view="blurred"))

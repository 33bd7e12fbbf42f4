"""PAPO's rows of the table of old keys: its switches become a view and loss terms.

They are translated as the released code behaves: masks on the raw picture, one per prompt, and masked log-probs that
are stored before the updates. `algorithm.views.masked.grad=true`, which these keys cannot say, lets them train.
"""

from __future__ import annotations

from verl.legacy.rule import Changes, Old, Rule, no_effect, only, refusal
from verl.legacy.table import register_rules

ESTIMATORS = {"low_var_kl": "k3", "kl": "k1", "mse": "k2"}
TERM, VIEW = "algorithm.terms.perception_kl", "algorithm.views.masked"
WHERE_WRONG = "algorithm.terms.perception_kl.incorrect_weight is the weight of wrong responses here"


def _perception_kl(old: Old) -> Changes:
    if not old["algorithm.use_kl_prcp"]:
        return {}
    penalty = old["algorithm.kl_prcp_penalty"]
    if penalty not in ESTIMATORS:
        raise refusal("algorithm.kl_prcp_penalty", penalty, f"known are {', '.join(ESTIMATORS)}")
    changes = {
        f"/view@{VIEW}": "random_patch",
        **{f"{VIEW}.{name}": value for name, value in _mask(old["algorithm.aug_config"]).items()},
        f"/term@{TERM}": "perception_kl",
        f"{TERM}.coef": old["algorithm.kl_prcp_coef"],
        f"{TERM}.estimator": ESTIMATORS[penalty],
    }
    if old["algorithm.use_kl_prcp_clipping"]:
        changes[f"{TERM}.cap"] = old["algorithm.kl_prcp_clipping"]
    if old["algorithm.use_kl_prcp_token_level_mask"]:
        share = old["algorithm.kl_prcp_token_level_mask_top_p"]
        # Upstream divides the sum over the chosen tokens by the number of all tokens, here it is their own mean.
        changes |= {f"{TERM}.top_fraction": share, f"{TERM}.coef": share * old["algorithm.kl_prcp_coef"]}
    return changes


def _mask(options: Old | None) -> dict[str, object]:
    """The view's options from upstream's `aug_config`, whose defaults are those of its masking function."""
    options = {"patch_size": 14, "black_prob": 0.5, **(options or {})}
    mask = {"patch_size": options.pop("patch_size"), "prob": options.pop("black_prob")}
    for name, value in options.items():
        raise refusal(f"algorithm.aug_config.{name}", value, "patch_size and black_prob are known")
    return {**mask, "grad": False, "stage": "raw", "per": "prompt"}


def _masked_entropy(old: Old) -> Changes:
    if not old["algorithm.use_aug_entropy_loss"]:
        return {}
    if not old["algorithm.use_kl_prcp"]:
        raise refusal(
            "algorithm.use_aug_entropy_loss", True, "there is no masked view without algorithm.use_kl_prcp=true"
        )
    term = "algorithm.terms.masked_entropy"
    return {
        f"/term@{term}": "entropy",
        f"{term}.view": "masked",
        f"{term}.coef": old["algorithm.aug_entropy_loss_coef"],
    }


def _entropy(old: Old) -> Changes:
    use = old["algorithm.use_ori_entropy_loss"]
    return {"algorithm.terms.entropy.coef": old["algorithm.ori_entropy_loss_coef"]} if use else {}


def _imitation(old: Old) -> Changes:
    if not old["algorithm.use_sft_loss"]:
        return {}
    return {"/term@algorithm.terms.sft": "sft", "algorithm.terms.sft.coef": old["algorithm.sft_loss_coef"]}


def _average(old: Old) -> Changes:
    mode = old["algorithm.loss_avg_mode"]
    return {"worker.actor.loss_avg_mode": mode} if mode else {}


register_rules(
    [
        Rule(
            {
                "algorithm.use_kl_prcp": False,
                "algorithm.kl_prcp_coef": 1e-3,
                "algorithm.kl_prcp_penalty": "kl",
                "algorithm.aug_config": {},
                "algorithm.use_kl_prcp_clipping": False,
                "algorithm.kl_prcp_clipping": 0.2,
                "algorithm.use_kl_prcp_token_level_mask": False,
                "algorithm.kl_prcp_token_level_mask_top_p": 0.2,
            },
            _perception_kl,
            why="no masked view, no term perception_kl",
            plain={
                "algorithm.kl_prcp_coef": f"{TERM}.coef",
                "algorithm.aug_config.patch_size": f"{VIEW}.patch_size",
                "algorithm.aug_config.black_prob": f"{VIEW}.prob",
            },
        ),
        only(
            "algorithm.contrastive_type", "augmented", ("augmented",), "other pictures are other views: see papo mask"
        ),
        only(
            "algorithm.kl_prcp_schedule",
            "fixed",
            ("fixed",),
            f"write it as {TERM}.schedule.shape=linear with .end (a factor) and .steps, and for the entropies alike",
        ),
        no_effect("algorithm.kl_prcp_schedule_args", {}, "the schedule is fixed"),
        only("algorithm.kl_prcp_apply_mode", "all", ("all",), WHERE_WRONG),
        no_effect("algorithm.incorrect_weighting", 0.1, f"upstream reads it in no mode; {WHERE_WRONG}"),
        Rule(
            {"algorithm.use_aug_entropy_loss": False, "algorithm.aug_entropy_loss_coef": 0.03},
            _masked_entropy,
            why="no term masked_entropy",
            plain={"algorithm.aug_entropy_loss_coef": "algorithm.terms.masked_entropy.coef"},
        ),
        Rule(
            {"algorithm.use_ori_entropy_loss": False, "algorithm.ori_entropy_loss_coef": 0.03},
            _entropy,
            why="the entropy is a metric and not trained",
            plain={"algorithm.ori_entropy_loss_coef": "algorithm.terms.entropy.coef"},
        ),
        Rule(
            {"algorithm.use_sft_loss": False, "algorithm.sft_loss_coef": 1e-3},
            _imitation,
            why="no term sft",
            plain={"algorithm.sft_loss_coef": "algorithm.terms.sft.coef"},
        ),
        Rule({"algorithm.loss_avg_mode": None}, _average),
        no_effect("data.aug_image_key", "images_aug", "masks are drawn here; the view precomputed reads a column"),
        only("data.format_prompt_stage_2", None, (None,), "there is no second stage"),
        no_effect("worker.rollout.stage2_override_config", {}, "there is no second stage"),
    ]
)

"""What a person sets about reinforcement learning: one frozen dataclass, checked when it is made.

The methods differ in what an answer is compared with, and in details that are fields of their own:

  ppo                    a critic's values, generalised advantages (arXiv:1707.06347, 1909.08593)
  rloo                   the mean of the prompt's other answers (arXiv:2402.14740)
  grpo                   the group's mean, divided by its deviation (arXiv:2402.03300)
  dr_grpo                the group's mean; every token counts 1 / longest length (arXiv:2503.20783)
  reinforce_pp           nothing; whitened over the whole batch (REINFORCE++, arXiv:2501.03262)
  reinforce_pp_baseline  the group's mean, then whitened over the whole batch
  remax                  the reward of the greedy answer (arXiv:2310.10505)
  best_of_n              fine-tuning on each prompt's best answer (RFT, RAFT: arXiv:2304.06767)
  online_dpo             DPO on each prompt's best and worst answer (arXiv:2402.04792)
"""

import dataclasses
from typing import Any

from chatyuan.errors import UserError, did_you_mean
from chatyuan.ops.advantages import GROUP_SCALES
from chatyuan.ops.kl import ESTIMATORS
from chatyuan.ops.policy_losses import AGGREGATIONS
from chatyuan.ops.token_rewards import Endings

# What a method's open fields (None) mean. Every difference between the methods stands here.
_REWARD = {"kl_place": "reward", "kl_estimator": "k1", "whiten_advantages": False}
_LOSS = {"kl_place": "loss", "kl_estimator": "k3", "whiten_advantages": False}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "ppo": {**_REWARD, "whiten_advantages": True, "aggregation": "token-mean"},
    "rloo": {**_REWARD, "aggregation": "seq-mean-token-sum"},
    "grpo": {**_LOSS, "aggregation": "seq-mean-token-mean"},
    "dr_grpo": {**_LOSS, "aggregation": "seq-mean-token-sum-norm"},
    "reinforce_pp": {**_REWARD, "whiten_advantages": True, "aggregation": "token-mean"},
    "reinforce_pp_baseline": {
        **_LOSS, "kl_estimator": "k2", "whiten_advantages": True, "aggregation": "token-mean",
    },
    "remax": {**_REWARD, "aggregation": "seq-mean-token-sum"},
    "best_of_n": {**_REWARD, "aggregation": "token-mean"},
    "online_dpo": {**_REWARD, "aggregation": "token-mean"},
}  # fmt: skip
METHODS = tuple(_DEFAULTS)
# Methods that compare a prompt's answers with each other.
GROUPED = ("rloo", "grpo", "dr_grpo", "reinforce_pp_baseline", "best_of_n", "online_dpo")
CRITICS = ("shared", "separate")
CHOICES = {
    "method": METHODS,
    "critic": CRITICS,
    "kl_place": ("reward", "loss"),
    "kl_estimator": ESTIMATORS,
    "aggregation": AGGREGATIONS,
    "scale_rewards": ("none", "running"),
    "group_scale": GROUP_SCALES,
    "zero_spread": ("keep", "drop"),
}


def _field(default: object, help_text: str, unit: str = "") -> Any:
    return dataclasses.field(default=default, metadata={"help": help_text, "unit": unit})


@dataclasses.dataclass(frozen=True)
class AlignConfig:
    """One iteration: from scored answers to an improved policy. None means the method's own.

    Raises:
      UserError: a name that does not exist, a value outside its range, fields that exclude each
        other.
    """

    method: str = _field("ppo", "one of " + ", ".join(METHODS))
    epochs: int = _field(4, "passes over the answers of an iteration", "epochs")
    minibatches: int = _field(1, "optimizer steps of one epoch", "minibatches")
    microbatches: int = _field(
        1, "parts that a minibatch (and scoring) is worked off in, to save memory", "microbatches"
    )

    clip: float = _field(0.2, "the ratio of probabilities learns within 1 - clip .. 1 + clip")
    clip_high: float | None = _field(None, "upper side of it where it differs (DAPO: 0.28)")
    dual_clip: float | None = _field(
        None, "bound on the loss of a bad answer, times its advantage (arXiv:1912.09729: 3.0)"
    )
    aggregation: str | None = _field(
        None,
        "how tokens become one loss: " + ", ".join(AGGREGATIONS),
    )
    entropy_coef: float = _field(0.0, "bonus for entropy of the next token")
    stop_kl: float | None = _field(
        None, "no more optimizer steps in an iteration once the policy moved this far", "nats/token"
    )

    kl_coef: float = _field(0.05, "beta: price of a nat between policy and reference")
    kl_place: str | None = _field(None, "the price is part of the reward, or of the loss")
    kl_estimator: str | None = _field(
        None, "k1, k2, k3 (Schulman 2020); as a loss k2, k1+ and k3+ have the right gradient"
    )
    kl_target: float | None = _field(
        None, "adapt beta until this divergence is reached; None = beta is fixed", "nats/answer"
    )
    kl_horizon: float = _field(10_000.0, "how slowly beta adapts", "answers")

    scale_rewards: str = _field(
        "none",
        "divide scores by nothing (none) or by the deviation of all scores so far (running); their "
        "mean stays, since moving it would pay for length",
    )
    whiten_rewards: bool = _field(
        False, "rewards of tokens have deviation 1 over the batch; their mean stays (ppo)"
    )
    clip_reward: float | None = _field(None, "bound on |score|, after scaling")
    no_end_score: float | None = _field(
        None, "score of an answer without end token, whatever it says (EOS trick; -1 is usual)"
    )
    no_end_penalty: float = _field(0.0, "subtracted from the score of such an answer")
    min_length: int = _field(
        0, "an answer that ends earlier counts as one without end token", "tokens"
    )
    overlong_buffer: int = _field(
        0, "last tokens of the longest length in which an answer pays, 0 to 1 (DAPO)", "tokens"
    )
    overlong_penalty: float = _field(1.0, "what the longest answer pays")

    gamma: float = _field(1.0, "discount per token")
    lam: float = _field(0.95, "lambda of the generalised advantages")
    whiten_advantages: bool | None = _field(
        None, "advantages of the whole batch have mean 0 and deviation 1"
    )
    group_ddof: int = _field(1, "grpo: 1 or 0, subtracted from the count in the deviation")
    group_eps: float = _field(1e-6, "grpo: added to the deviation")
    group_scale: str = _field("group", "grpo: deviation of each prompt's group, or of the batch")
    zero_spread: str = _field("keep", "prompts whose answers all score alike: keep, or drop")

    lag: int = _field(
        0,
        "1: while the policy learns, the next answers are drawn with what it was before (one-step-"
        "off); 0: they wait for it",
        "iterations",
    )
    importance_cap: float = _field(
        2.0, "lag: bound on p(token) of the policy before the update over that of its drawer"
    )

    critic: str = _field("shared", "a head on the policy, or a separate model")
    critic_warmup: int = _field(0, "first iterations in which only the critic learns", "iterations")
    value_coef: float = _field(0.1, "weight of the critic's loss")
    value_clip: float | None = _field(
        0.2, "values learn within this distance of the old ones; None = off"
    )

    reference_layers: int | None = _field(
        None,
        "train only so many upper decoder layers and the head; the reference shares the frozen "
        "rest (hydra). None = train everything, with a whole copy as reference",
        "layers",
    )
    dpo_beta: float = _field(0.1, "online_dpo: beta of the preference loss")
    ptx_coef: float = _field(0.0, "weight of the pretraining mixture's gradient (InstructGPT)")

    def __post_init__(self) -> None:
        """Fills in the method's own values and checks every field; see the class."""
        _check_choice("method", self.method)
        for name, value in _DEFAULTS[self.method].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name in CHOICES:
            _check_choice(name, getattr(self, name))
        for name, low in (("epochs", 1), ("minibatches", 1), ("microbatches", 1), ("min_length", 0),
                          ("overlong_buffer", 0), ("critic_warmup", 0), ("lag", 0)):  # fmt: skip
            if getattr(self, name) < low:
                raise UserError(f"{name} = {getattr(self, name)} should be at least {low}.")
        for name in ("clip", "clip_high", "stop_kl", "kl_target", "kl_horizon", "clip_reward",
                     "value_clip", "dpo_beta", "group_eps", "importance_cap"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"{name} = {value} should be above 0.")
        for name in ("kl_coef", "entropy_coef", "value_coef", "ptx_coef", "no_end_penalty",
                     "overlong_penalty"):  # fmt: skip
            if getattr(self, name) < 0:
                raise UserError(f"{name} = {getattr(self, name)} should not be negative.")
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} = {getattr(self, name)} should lie within 0 and 1.")
        if self.lag > 1:
            raise UserError(
                f"lag = {self.lag} should be 0 or 1: what is older is corrected too badly by "
                "weights, and nothing more would overlap."
            )
        if self.lag and self.method == "remax":
            raise UserError(
                "lag = 1 does not go with method = 'remax', which compares an answer with the "
                "greedy one of the same policy; set lag = 0."
            )
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise UserError(f"dual_clip = {self.dual_clip} should be above 1 (3.0 is usual).")
        if self.group_ddof not in (0, 1):
            raise UserError(f"group_ddof = {self.group_ddof} should be 0 or 1.")
        if self.reference_layers is not None and self.reference_layers < 1:
            raise UserError(f"reference_layers = {self.reference_layers} should be at least 1.")
        if self.kl_target is not None and self.kl_coef == 0:
            raise UserError(
                f"kl_target = {self.kl_target} adapts kl_coef by factors, and kl_coef = 0 stays 0; "
                "start from 0.05, say."
            )
        for name in ("critic_warmup", "whiten_rewards"):
            if getattr(self, name) and self.method != "ppo":
                raise UserError(
                    f"{name} = {getattr(self, name)} belongs to method = 'ppo'; {self.method} has "
                    "no critic and no rewards of single tokens."
                )

    @property
    def has_critic(self) -> bool:
        """Whether a critic is trained."""
        return self.method == "ppo"

    @property
    def endings(self) -> Endings:
        """What the end of an answer changes in its score."""
        return Endings(
            missing_eos_score=self.no_end_score,
            missing_eos_penalty=self.no_end_penalty,
            min_length=self.min_length,
            overlong_buffer=self.overlong_buffer,
            overlong_penalty=self.overlong_penalty,
        )

    def check_samples(self, samples: int) -> None:
        """Raises UserError when the method compares answers and there is one a prompt."""
        if self.method in GROUPED and samples < 2:
            raise UserError(
                f"method = '{self.method}' compares the answers of a prompt: "
                f"RolloutConfig.samples = {samples} should be at least 2 (4 to 16 is usual)."
            )


def _check_choice(name: str, value: str) -> None:
    if value not in CHOICES[name]:
        raise UserError(
            f"{name} = {value!r} should be one of {', '.join(CHOICES[name])}."
            f"{did_you_mean(str(value), CHOICES[name])}"
        )

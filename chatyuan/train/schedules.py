"""Learning rate schedules: pure functions from the step to the learning rate.

The learning rate of a ScheduleConfig is always the peak, whatever the shape. Steps count from 0, so
that a warm-up starts at learning rate 0 (as in T5X) and reaches the peak at `warmup_steps`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp

from chatyuan.errors import UserError, did_you_mean

Schedule = Callable[[jax.typing.ArrayLike], jax.Array]

# name -> the fraction of the peak at train_steps when final_fraction is not given; None = endless.
_FINAL_FRACTIONS = {"constant": None, "rsqrt": None, "linear": 0.0, "cosine": 0.1, "wsd": 0.0}
_DECAY_SHAPES = ("linear", "cosine", "sqrt")


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over a run; every shape starts with the same linear warm-up.

    constant: the peak.
    rsqrt:    peak * sqrt(warmup_steps / step). It is T5X's 'constant * linear_warmup *
              rsqrt_decay' with base_learning_rate = peak * sqrt(warmup_steps): T5's 1.0 with 10,000
              steps of warm-up is learning_rate = 0.01 here.
    linear, cosine: from the peak down to final_fraction * peak at train_steps.
    wsd:      warm-up, stable, decay (MiniCPM, arXiv:2404.06395): the peak until the last
              decay_steps, which fall to final_fraction * peak in `decay_shape`; sqrt is 1 - sqrt(x)
              (arXiv:2405.18392). A run can be continued from any step before the decay.

    Raises:
      UserError: a name that does not exist, a value outside its range, a field that the named
        schedule does not use.
    """

    name: str = field(default="rsqrt", metadata={"help": "constant, rsqrt, linear, cosine or wsd"})
    learning_rate: float = field(default=1e-3, metadata={"help": "the peak learning rate"})
    warmup_steps: int = field(
        default=0, metadata={"help": "steps from 0 to the peak", "unit": "steps"}
    )
    train_steps: int | None = field(
        default=None,
        metadata={"help": "step at which linear, cosine and wsd end", "unit": "steps"},
    )
    final_fraction: float | None = field(
        default=None,
        metadata={"help": "last learning rate / peak; None = 0 (linear, wsd) or 0.1 (cosine)"},
    )
    decay_steps: int | None = field(
        default=None,
        metadata={"help": "length of wsd's decay; None = a fifth of the run", "unit": "steps"},
    )
    decay_shape: str | None = field(
        default=None, metadata={"help": "wsd's decay: linear, cosine or sqrt; None = sqrt"}
    )
    rewarm_from: int = field(
        default=0,
        metadata={
            "help": "step at which the schedule starts over, to continue a finished run "
            "(arXiv:2403.08763); before it the learning rate is 0",
            "unit": "steps",
        },
    )

    def __post_init__(self) -> None:
        """Checks every field; see the class for what is raised."""
        if self.name not in _FINAL_FRACTIONS:
            choices = ", ".join(_FINAL_FRACTIONS)
            raise UserError(
                f"ScheduleConfig.name = {self.name!r} is not a schedule; use one of {choices}."
                f"{did_you_mean(self.name, _FINAL_FRACTIONS)}"
            )
        _check_unused(self)
        for name in ("learning_rate", "warmup_steps", "rewarm_from"):
            if getattr(self, name) < 0:
                raise UserError(f"ScheduleConfig.{name} = {getattr(self, name)} is negative.")
        if self.final_fraction is not None and not 0 <= self.final_fraction <= 1:
            raise UserError(
                f"ScheduleConfig.final_fraction = {self.final_fraction} is outside [0, 1]; it is a "
                "fraction of the peak, 0.1 for a tenth."
            )
        if self.decay_shape is not None and self.decay_shape not in _DECAY_SHAPES:
            raise UserError(
                f"ScheduleConfig.decay_shape = {self.decay_shape!r} is not a shape; use one of "
                f"{', '.join(_DECAY_SHAPES)}.{did_you_mean(self.decay_shape, _DECAY_SHAPES)}"
            )
        _check_length(self)


def _check_unused(config: ScheduleConfig) -> None:
    """A field that the schedule would ignore is a mistake, not a wish."""
    unused = []
    if _FINAL_FRACTIONS[config.name] is None:
        unused.append("final_fraction")
    if config.name != "wsd":
        unused += ["decay_steps", "decay_shape"]
    for name in unused:
        if getattr(config, name) is not None:
            raise UserError(
                f"ScheduleConfig.{name} = {getattr(config, name)!r} is not used by the "
                f"{config.name} schedule; remove it or choose another ScheduleConfig.name."
            )


def _check_length(config: ScheduleConfig) -> None:
    if _FINAL_FRACTIONS[config.name] is None:
        return
    if config.train_steps is None:
        raise UserError(
            f"ScheduleConfig.train_steps must be set for the {config.name} schedule, which ends "
            "there; set TRAIN_STEPS, or use constant or rsqrt."
        )
    needed = config.rewarm_from + config.warmup_steps + (config.decay_steps or 0)
    if config.train_steps < needed:
        raise UserError(
            f"ScheduleConfig.train_steps = {config.train_steps} is less than the {needed} steps of "
            f"rewarm_from = {config.rewarm_from} + warmup_steps = {config.warmup_steps} + "
            f"decay_steps = {config.decay_steps or 0}; train longer or shorten them."
        )


def make_schedule(config: ScheduleConfig) -> Schedule:
    """Returns `schedule(step) -> learning rate`, float32; the step may be traced."""
    final_fraction = config.final_fraction
    if final_fraction is None:
        final_fraction = _FINAL_FRACTIONS[config.name]
    warmup = config.warmup_steps
    length = (config.train_steps or 0) - config.rewarm_from  # of this schedule, warm-up included
    decay_steps = length - warmup
    if config.name == "wsd":
        decay_steps = config.decay_steps
        if decay_steps is None:
            decay_steps = min(max(length // 5, 1), length - warmup)
    shape = {"cosine": "cosine", "linear": "linear"}.get(config.name, config.decay_shape or "sqrt")

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        # Small integers are exact in float32 up to 16.7 million steps.
        offset = jnp.asarray(step, jnp.float32) - config.rewarm_from
        value = jnp.float32(config.learning_rate)
        if config.name == "rsqrt":
            value *= jnp.sqrt(max(warmup, 1) / jnp.maximum(offset, max(warmup, 1)))
        elif final_fraction is not None:
            progress = (offset - (length - decay_steps)) / max(decay_steps, 1)
            kept = _decay(shape, jnp.clip(progress, 0.0, 1.0))
            value *= final_fraction + (1.0 - final_fraction) * kept
        if warmup:
            value *= jnp.clip(offset / warmup, 0.0, 1.0)
        return jnp.where(offset >= 0, value, 0.0)

    return schedule


def _decay(shape: str, progress: jax.Array) -> jax.Array:
    """From 1 at progress 0 to 0 at progress 1."""
    if shape == "linear":
        return 1.0 - progress
    if shape == "cosine":
        return 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
    return 1.0 - jnp.sqrt(progress)

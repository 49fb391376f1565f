"""Optimizers by name, built on optax, that know which axes of a parameter are its matrix.

Parameters of all layers are stacked on an axis named "layers". Everything here that looks at a
whole matrix (factored moments, RMS, clipping, orthogonalisation) does so for each layer by itself,
so that a stacked parameter moves exactly as the separate ones would. Logical axis names decide it.

The learning rate has one source: `Optimizer.update` evaluates `Optimizer.schedule` at the step that
it is given, and the train step logs the same value. (T5X's wrapper of optax drops the trainer's
learning rate and logs it nevertheless.)
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

from chatyuan.errors import UserError, did_you_mean
from chatyuan.train.schedules import Schedule
from chatyuan.train.updates import Optimizer, accepted, keeping, scale_first, scheduled, unshared

Tree = Any
BATCH_AXES = frozenset({"layers", "stack"})  # independent matrices
TABLE_AXES = frozenset({"relpos_buckets"})  # lookup tables that are no linear maps

# Each optimizer's fields with their defaults; a field that is absent is a mistake to set.
_DECAY = {"weight_decay": 0.1, "weight_decay_lr_exponent": 1.0, "decay_embeddings": False}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "adafactor": {
        "eps": 1e-30,
        "weight_decay": 0.0,
        "weight_decay_lr_exponent": 0.0,
        "decay_embeddings": True,
        "decay_exponent": 0.8,
        "clipping_threshold": 1.0,
        "min_dim_size_to_factor": 128,
        "parameter_scale": True,
        "min_parameter_rms": 1e-3,
    },
    "adamw": {"b1": 0.9, "b2": 0.95, "eps": 1e-8, **_DECAY},
    "adamw_rms": {
        "b1": 0.9,
        "b2": 0.999,
        "eps": 1e-6,
        **_DECAY,
        "weight_decay": 0.0,
        "min_parameter_rms": 1e-3,
    },
    "muon": {
        "b1": 0.9,
        "b2": 0.95,
        "eps": 1e-8,
        **_DECAY,
        "momentum": 0.95,
        "newton_schulz_steps": 5,
        "matched_rms": 0.2,
    },
}


def _field(help_text: str) -> Any:
    """A field that takes its default from the optimizer's row of `_DEFAULTS`."""
    return dataclasses.field(default=None, metadata={"help": help_text + "; None = its default"})


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Which optimizer, and the numbers that differ from its defaults (`resolve` fills them in).

    adafactor: T5's (Shazeer & Stern 2018, arXiv:1804.04235), as T5X: factored second moments,
      clipped updates, steps relative to the RMS of the parameter.
    adamw: Loshchilov & Hutter 2019 (arXiv:1711.05101), with b2 0.95 as GPT-3 and LLaMA.
    adamw_rms: AdamW whose step is multiplied by max(1e-3, RMS of the matrix), which is what lets it
      match Adafactor at T5's learning rates (nanoT5, Nawrot 2023, arXiv:2309.02373).
    muon: orthogonalised momentum for matrices (Jordan et al. 2024) at the update RMS of Adam
      (Liu et al. 2025, arXiv:2502.16982), so that both share a learning rate; Adam for embeddings,
      head, position tables and norms.

    Weight decay: a parameter loses `weight_decay * learning_rate ** weight_decay_lr_exponent` of
    itself a step, outside the moments (decoupled). Exponent 1 is what AdamW means by it. T5X's
    Adafactor does not multiply by the learning rate: exponent 0, its default here too, where 1e-3
    is a large decay; 2 is PaLM's. Norm scales and position tables never decay.

    Raises:
      UserError: a name that does not exist, a field that it does not use, a value out of range.
    """

    name: str = dataclasses.field(
        default="adafactor", metadata={"help": "adafactor, adamw, adamw_rms or muon"}
    )
    clip_norm: float | None = dataclasses.field(
        default=None, metadata={"help": "largest global norm of the gradient; None = no clipping"}
    )
    b1: float | None = _field("decay of Adam's first moment")
    b2: float | None = _field("decay of Adam's second moment")
    eps: float | None = _field("added to Adam's denominator, or to Adafactor's squared gradient")
    weight_decay: float | None = _field("share of a parameter that decays a step, see the exponent")
    weight_decay_lr_exponent: float | None = _field(
        "power of the learning rate that multiplies weight_decay (1 AdamW, 0 T5X's Adafactor)"
    )
    decay_embeddings: bool | None = _field("whether the token embedding decays")
    decay_exponent: float | None = _field("adafactor: second moments decay by 1 - step ** -this")
    clipping_threshold: float | None = _field("adafactor: largest RMS of an update of a matrix")
    min_dim_size_to_factor: int | None = _field("adafactor: smaller matrices keep full moments")
    parameter_scale: bool | None = _field("adafactor: steps are relative to the parameter's RMS")
    min_parameter_rms: float | None = _field("smallest RMS that a parameter counts with")
    momentum: float | None = _field("muon: decay of the momentum of matrices")
    newton_schulz_steps: int | None = _field("muon: iterations of the orthogonalisation")
    matched_rms: float | None = _field("muon: RMS of an update at learning rate 1")

    def __post_init__(self) -> None:
        """Checks every field; see the class for what is raised."""
        if self.name not in _DEFAULTS:
            raise UserError(
                f"OptimizerConfig.name = {self.name!r} is not an optimizer; use one of "
                f"{', '.join(_DEFAULTS)}.{did_you_mean(self.name, _DEFAULTS)}"
            )
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None or field.name in ("name", "clip_norm"):
                continue
            if field.name not in _DEFAULTS[self.name]:
                raise UserError(
                    f"OptimizerConfig.{field.name} = {value!r} is not used by {self.name}; "
                    f"remove it. {self.name} uses {', '.join(sorted(_DEFAULTS[self.name]))}."
                )
            if value < 0 or (field.name in ("b1", "b2", "momentum") and value >= 1):
                limits = "[0, 1)" if field.name in ("b1", "b2", "momentum") else "[0, inf)"
                raise UserError(
                    f"OptimizerConfig.{field.name} = {value!r} is outside {limits}; "
                    f"the default of {self.name} is {_DEFAULTS[self.name][field.name]!r}."
                )
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise UserError(
                f"OptimizerConfig.clip_norm = {self.clip_norm} must be positive; None turns it off."
            )


def resolve(config: OptimizerConfig) -> OptimizerConfig:
    """Returns the configuration with the optimizer's defaults in place of None."""
    missing = {
        name: value
        for name, value in _DEFAULTS[config.name].items()
        if getattr(config, name) is None
    }
    return dataclasses.replace(config, **missing)


@dataclasses.dataclass(frozen=True)
class ParameterLayout:
    """How a parameter is read: `batch` axes of independent matrices, then rows and columns.

    kind: matrix, embedding (vocabulary first), head (vocabulary last), table or vector.
    """

    kind: str
    batch: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]

    @property
    def whole(self) -> tuple[int, ...]:
        """The axes of one parameter of the batch."""
        return tuple(sorted(self.rows + self.columns))


def parameter_layout(axes: tuple[str | None, ...]) -> ParameterLayout:
    """Returns the layout of a parameter with these logical axis names.

    With more than two axes that are not batch axes, "embed" is one side of the matrix and the
    others together are the other, as in T5X's factor rules: [embed, heads, kv] is a matrix of embed
    rows and heads * kv columns.
    """
    batch = tuple(i for i, name in enumerate(axes) if name in BATCH_AXES)
    rest = tuple(i for i, name in enumerate(axes) if name not in BATCH_AXES)
    if len(rest) < 2:
        return ParameterLayout("vector", batch, rest, ())
    names = [axes[i] for i in rest]
    rows = rest[:1]
    if len(rest) > 2:
        embed = tuple(i for i in rest if axes[i] == "embed")
        rows = embed[:1] or rest[:1]
    columns = tuple(i for i in rest if i not in rows)
    kind = "matrix"
    if TABLE_AXES & set(names):
        kind = "table"
    elif "vocab" in names:
        kind = "embedding" if names[0] == "vocab" else "head"
    return ParameterLayout(kind, batch, rows, columns)


def parameter_layouts(abstract_params: Tree, logical_axes: Tree) -> Tree:
    """Returns the tree of layouts of the parameters."""

    def layout(param: Any, axes: tuple[str | None, ...]) -> ParameterLayout:
        assert len(param.shape) == len(axes), (param.shape, axes)
        return parameter_layout(tuple(axes))

    return jax.tree.map(layout, abstract_params, logical_axes)


def make_optimizer(
    config: OptimizerConfig, schedule: Schedule, abstract_params: Tree, logical_axes: Tree
) -> Optimizer:
    """Returns the optimizer of a configuration.

    Args:
      config: the name and its numbers.
      schedule: step -> learning rate, from `chatyuan.train.schedules.make_schedule`.
      abstract_params: the tree of parameters; only shapes are read.
      logical_axes: the same tree with a tuple of axis names per parameter.
    """
    config = resolve(config)
    layouts = parameter_layouts(abstract_params, logical_axes)
    make_core = {
        "adafactor": _adafactor,
        "adamw": _adamw,
        "adamw_rms": _adamw_rms,
        "muon": _muon,
    }[config.name]
    decaying = {"matrix", "head"} | ({"embedding"} if config.decay_embeddings else set())
    return scheduled(
        make_core(config, layouts),
        schedule,
        clip_norm=config.clip_norm,
        weight_decay=config.weight_decay,
        weight_decay_lr_exponent=config.weight_decay_lr_exponent,
        decay_mask=jax.tree.map(lambda layout: layout.kind in decaying, layouts),
    )


def _adam(config: OptimizerConfig) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_adam` whose state stays as it was where a step is not accepted.

    The direction is made of the moments that are stored: so XLA writes them in place. Of two
    moments that are stored or not, by `accept`, and a direction of the new ones it makes three
    loops that each read the old moments, and copies both of these before each step.
    """
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps)

    def update(
        gradients: Tree,
        state: optax.ScaleByAdamState,
        params: Tree | None = None,
        *,
        accept: jax.typing.ArrayLike = True,
        **_: Any,
    ) -> tuple[Tree, optax.ScaleByAdamState]:
        _, moved = adam.update(gradients, state, params)
        kept = accepted(accept, moved, state)
        means = optax.tree.bias_correction(kept.mu, config.b1, moved.count)
        squares = optax.tree.bias_correction(kept.nu, config.b2, moved.count)
        directions = jax.tree.map(
            lambda mean, square: mean / (jnp.sqrt(square) + config.eps), means, squares
        )
        return directions, kept

    return optax.GradientTransformationExtraArgs(adam.init, update)


def _adamw(config: OptimizerConfig, layouts: Tree) -> optax.GradientTransformationExtraArgs:
    del layouts  # Adam is elementwise
    return scale_first(_adam(config))


def _adamw_rms(config: OptimizerConfig, layouts: Tree) -> optax.GradientTransformationExtraArgs:
    def scale(updates: Tree, params: Tree) -> Tree:
        return jax.tree.map(
            lambda update, param, layout: (
                update * _clipped_rms(param, layout, config.min_parameter_rms)
            ),
            updates,
            params,
            layouts,
        )

    return scale_first(optax.chain(_adam(config), optax.stateless(scale)))


def _muon(config: OptimizerConfig, layouts: Tree) -> optax.GradientTransformationExtraArgs:
    """Muon on matrices, each layer by itself: optax treats axes it is not told about as a batch."""
    matrices = jax.tree.map(
        lambda layout: layout if layout.kind == "matrix" else optax.MaskedNode(), layouts
    )

    def match_rms(updates: Tree, params: Tree) -> Tree:
        """An orthogonal [m, n] has RMS max(m, n) ** -0.5."""
        del params
        return jax.tree.map(
            lambda update, layout: (
                update * (config.matched_rms * max(_sides(update, layout)) ** 0.5)
            ),
            updates,
            matrices,
        )

    orthogonal = optax.contrib.scale_by_muon(
        ns_steps=config.newton_schulz_steps,
        beta=config.momentum,
        weight_dimension_numbers=jax.tree.map(
            lambda layout: optax.contrib.MuonDimensionNumbers(layout.rows, layout.columns), matrices
        ),
    )
    transformation = optax.partition(
        {
            "matrix": keeping(optax.chain(orthogonal, optax.stateless(match_rms))),
            "other": _adam(config),
        },
        jax.tree.map(lambda layout: "matrix" if layout.kind == "matrix" else "other", layouts),
    )
    return scale_first(transformation)


class AdafactorState(NamedTuple):
    """count: int32 updates so far. moments: a dict of float32 arrays per parameter.

    A factored parameter has `row` (its shape with the columns reduced to 1) and `column` (with the
    rows reduced to 1), another one has `full`.
    """

    count: jax.Array
    moments: Tree


def _adafactor(config: OptimizerConfig, layouts: Tree) -> optax.GradientTransformationExtraArgs:
    """T5X's `adafactor.py` without momentum: the update, not yet times the learning rate."""

    def init(params: Tree) -> AdafactorState:
        def moments(param: jax.Array, layout: ParameterLayout) -> dict[str, jax.Array]:
            if not _is_factored(param, layout, config.min_dim_size_to_factor):
                return {"full": jnp.zeros(param.shape, jnp.float32)}
            return {
                "row": jnp.zeros(_reduced(param.shape, layout.columns), jnp.float32),
                "column": jnp.zeros(_reduced(param.shape, layout.rows), jnp.float32),
            }

        return AdafactorState(jnp.zeros((), jnp.int32), jax.tree.map(moments, params, layouts))

    def update(
        gradients: Tree,
        state: AdafactorState,
        params: Tree,
        *,
        gradient_scale: jax.typing.ArrayLike,
        accept: jax.typing.ArrayLike,
    ) -> tuple[Tree, AdafactorState]:
        # 0 at the first update, so that zeros as initial moments bias nothing.
        decay = 1.0 - (state.count + 1).astype(jnp.float32) ** -config.decay_exponent
        leaves, structure = jax.tree.flatten(gradients)
        results = [
            _adafactor_parameter(config, decay, gradient_scale, *arguments)
            for arguments in zip(
                leaves,
                structure.flatten_up_to(state.moments),
                structure.flatten_up_to(params),
                structure.flatten_up_to(layouts),
                strict=True,
            )
        ]
        directions = structure.unflatten([direction for direction, _ in results])
        moments = structure.unflatten([moment for _, moment in results])
        new = AdafactorState(optax.safe_increment(state.count), moments)
        return directions, accepted(accept, new, state)

    return optax.GradientTransformationExtraArgs(init, update)


def _adafactor_parameter(
    config: OptimizerConfig,
    decay: jax.Array,
    gradient_scale: jax.typing.ArrayLike,
    gradient: jax.Array,
    moments: dict[str, jax.Array],
    param: jax.Array,
    layout: ParameterLayout,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """One parameter's step relative to the learning rate, and its new moments.

    With g the scaled gradient, row_i and column_j the running means of g**2 + eps over the columns
    and over the rows, the second moment is estimated as row_i * column_j / mean(row); the step
    u = g / sqrt(that) is divided by max(1, RMS(u) / clipping_threshold) and multiplied by
    max(min_parameter_rms, RMS(param)).
    """
    gradient = gradient.astype(jnp.float32)

    def running(old: jax.Array, square: jax.Array) -> jax.Array:
        square = square * jnp.square(gradient_scale) + config.eps
        return decay * old + (1.0 - decay) * square

    if "full" in moments:
        moments = {"full": running(moments["full"], jnp.square(gradient))}
        step = gradient * (gradient_scale * jax.lax.rsqrt(moments["full"]))
        mean_square_step = jnp.mean(jnp.square(step), layout.whole, keepdims=True)
    else:
        row = running(moments["row"], jnp.mean(jnp.square(gradient), layout.columns, keepdims=True))
        column = running(moments["column"], _mean_square_of_columns(gradient, layout.rows))
        moments = {"row": row, "column": column}
        row_factor = gradient_scale * jax.lax.rsqrt(row / jnp.mean(row, layout.rows, keepdims=True))
        column_factor = jax.lax.rsqrt(column)
        step = gradient * row_factor * column_factor
        mean_square_step = jnp.mean(
            jnp.square(gradient * unshared(row_factor, 2)) / column,
            layout.whole,
            keepdims=True,
        )
    scale = 1.0 / jnp.maximum(1.0, jnp.sqrt(mean_square_step) / config.clipping_threshold)
    if config.parameter_scale:
        scale *= _clipped_rms(param, layout, config.min_parameter_rms)
    return step * scale, moments


def _mean_square_of_columns(gradient: jax.Array, rows: tuple[int, ...]) -> jax.Array:
    """Mean of g**2 over the axes `rows`, which stay as 1."""
    if len(rows) > 1 or gradient.shape[rows[0]] >= gradient.shape[-1]:
        return jnp.mean(jnp.square(unshared(gradient, 2)), rows, keepdims=True)
    return jax.lax.platform_dependent(
        gradient,
        cpu=lambda g: _sum_square_row_by_row(g, rows[0]) / g.shape[rows[0]],
        default=lambda g: jnp.mean(jnp.square(g), rows, keepdims=True),
    )


def _sum_square_row_by_row(gradient: jax.Array, axis: int) -> jax.Array:
    """Sum of g**2 over `axis`, in the order in which memory lies.

    XLA's CPU backend walks down one column after the other: 31 ms and more for a head of
    [256, 32128], where this takes 1 ms.
    """
    size = gradient.shape[axis]
    unroll = next(n for n in (16, 8, 4, 2, 1) if size % n == 0)

    def add(block: jax.Array, total: jax.Array) -> jax.Array:
        for offset in range(unroll):
            row = jax.lax.dynamic_slice_in_dim(gradient, block * unroll + offset, 1, axis)
            total += jnp.square(row)
        return total

    initial = jnp.zeros(_reduced(gradient.shape, (axis,)), gradient.dtype)
    return jax.lax.fori_loop(0, size // unroll, add, initial)


def _is_factored(param: jax.Array, layout: ParameterLayout, min_size: int) -> bool:
    return layout.kind not in ("vector", "table") and min(_sides(param, layout)) >= min_size


def _sides(param: jax.Array, layout: ParameterLayout) -> tuple[int, int]:
    """How many rows and how many columns one matrix has."""
    rows, columns = (
        int(np.prod([param.shape[axis] for axis in side])) for side in (layout.rows, layout.columns)
    )
    return rows, columns


def _reduced(shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(1 if i in axes else size for i, size in enumerate(shape))


def _clipped_rms(param: jax.Array, layout: ParameterLayout, minimum: float) -> jax.Array:
    """max(minimum, RMS of each parameter of the batch), with its axes kept as 1."""
    mean_square = jnp.mean(jnp.square(param), layout.whole, keepdims=True)
    return jnp.maximum(jnp.sqrt(mean_square), minimum)

"""One training step of a 22.7M-parameter T5 1.1: ours beside T5X and beside Hugging Face torch.

    python benchmarks/train_step.py --t5x_path=/path/to/t5x [--check]

All three systems hold the same float32 weights, see the same batch with padding at the row ends,
use no dropout, and update with the same rule. They run in processes of their own and take turns.
The first loss of all three must agree to 1e-5 of itself, or nothing is reported: a faster step that
computes something else is not faster. T5X runs its own network, loss, optimizer and partitioned
trainer step; Hugging Face runs `T5ForConditionalGeneration` in eager mode with the head untied from
the embedding (transformers ties them when left alone, which trains a smaller model).

T5X is not on a package index: clone it and name the clone with --t5x_path (and, where its
dependencies live in another environment, that Python with --t5x_python). Without it T5X is skipped.
"""

import argparse
import dataclasses
import json
import pathlib
import sys
import tempfile
import time
import types
from collections.abc import Callable
from typing import Any

import common
import numpy as np

VOCAB_SIZE, EMBED_DIM, MLP_DIM, NUM_HEADS, HEAD_DIM, NUM_LAYERS = 32128, 256, 512, 4, 64, 4
SHAPES = {"8x256/64": (8, 256, 64), "4x512/128": (4, 512, 128), "1x2048/512": (1, 2048, 512)}
OPTIMIZERS = ("adafactor", "adamw")
LEARNING_RATE = 1e-3
Z_LOSS = 1e-4
LOSS_TOLERANCE = 1e-5
# (goal, floor) of our speed over each peer's; Hugging Face's figure is for its usual AdamW.
TARGETS = {"t5x": (3.0, 2.0), "hf": (2.0, 1.5)}
FLOPS_RANGE = (0.97, 1.03)
COLUMNS = (
    "date", "device", "versions", "commit", "shape", "optimizer", "ours", "T5X", "HF torch",
    "x T5X", "x HF", "peak MiB ours/T5X/HF",
)  # fmt: skip


# ------------------------------------------------------------------------------- the shared problem


def make_weights(path: pathlib.Path) -> None:
    """Writes one set of weights under neutral names, matrices as [input, output].

    T5's initial scales (attention folds head_dim**-0.5 into the query), and norms away from 1 so
    that a norm put in the wrong place changes the loss.
    """
    rng = np.random.default_rng(0)
    width = NUM_HEADS * HEAD_DIM

    def normal(scale: float, *shape: int) -> np.ndarray:
        return (scale * rng.standard_normal(shape)).astype(np.float32)

    weights = {
        "embedding": normal(1.0, VOCAB_SIZE, EMBED_DIM),
        "head": normal(EMBED_DIM**-0.5, EMBED_DIM, VOCAB_SIZE),
    }
    for stack, blocks in (("encoder", ("self",)), ("decoder", ("self", "cross"))):
        weights[f"{stack}.bias"] = normal(0.3, 32, NUM_HEADS)
        weights[f"{stack}.norm"] = 1 + normal(0.1, EMBED_DIM)
        for layer in range(NUM_LAYERS):
            for block in blocks:
                name = f"{stack}.{layer}.{block}"
                weights[f"{name}.norm"] = 1 + normal(0.1, EMBED_DIM)
                weights[f"{name}.q"] = normal((EMBED_DIM * HEAD_DIM) ** -0.5, EMBED_DIM, width)
                weights[f"{name}.k"] = normal(EMBED_DIM**-0.5, EMBED_DIM, width)
                weights[f"{name}.v"] = normal(EMBED_DIM**-0.5, EMBED_DIM, width)
                weights[f"{name}.o"] = normal(width**-0.5, width, EMBED_DIM)
            name = f"{stack}.{layer}.mlp"
            weights[f"{name}.norm"] = 1 + normal(0.1, EMBED_DIM)
            weights[f"{name}.wi_0"] = normal(EMBED_DIM**-0.5, EMBED_DIM, MLP_DIM)
            weights[f"{name}.wi_1"] = normal(EMBED_DIM**-0.5, EMBED_DIM, MLP_DIM)
            weights[f"{name}.wo"] = normal(MLP_DIM**-0.5, MLP_DIM, EMBED_DIM)
    np.savez(path, **weights)


def make_batch(batch: int, input_length: int, target_length: int) -> dict[str, np.ndarray]:
    """One batch under SeqIO's names; row i ends in up to i/16 of padding on either side."""
    rng = np.random.default_rng(1)

    def tokens(length: int) -> np.ndarray:
        rows = rng.integers(3, VOCAB_SIZE - 128, (batch, length), dtype=np.int32)
        real = np.array([length - row * length // (16 * batch) for row in range(batch)])
        return np.where(np.arange(length) < real[:, None], rows, 0)

    inputs, targets = tokens(input_length), tokens(target_length)
    shifted = np.pad(targets[:, :-1], ((0, 0), (1, 0)))
    return {
        "encoder_input_tokens": inputs,
        "decoder_input_tokens": np.where(targets > 0, shifted, 0).astype(np.int32),
        "decoder_target_tokens": targets,
        "decoder_loss_weights": (targets > 0).astype(np.float32),
    }


def number_of_targets(batch: dict[str, np.ndarray]) -> int:
    """How many target tokens carry loss."""
    return int((batch["decoder_target_tokens"] > 0).sum())


# ----------------------------------------------------------------------------------------- workers


@dataclasses.dataclass
class System:
    """A system that can take one step and wait for it; the step returns the mean loss per token."""

    step: Callable[[], float]
    description: str
    # Compiled FLOPs over counted ones; a function, because it compiles and takes memory itself.
    flops_ratio: Callable[[], float] | None = None
    # What the next step starts from, as a checkpoint holds it.
    state: Callable[[], Any] | None = None


def stub_unpublished_modules() -> None:
    """Gives T5X's imports of `airio` and `jestimator` something to find.

    Neither is on a package index and neither takes part in a step: T5X asks `isinstance` of the
    first (its other data pipeline) and lists an optimizer of the second.
    """
    import importlib.util

    if importlib.util.find_spec("airio") is None:
        core = types.ModuleType("airio.core")
        for name in ("AirIODatasetIterator", "DatasetProviderBase", "Task", "Mixture"):
            setattr(core, name, type(name, (), {}))
        package = types.ModuleType("airio")
        package.core = package.pygrain_common = core
        for name in ("airio.core", "airio.pygrain_common"):
            sys.modules[name] = core
        sys.modules["airio"] = package
    if importlib.util.find_spec("jestimator") is None:
        package = types.ModuleType("jestimator")
        package.amos = types.SimpleNamespace(
            ScaleByAmosState=type("ScaleByAmosState", (), {}), amos=dict
        )
        package.amos_helper = types.SimpleNamespace(state_partition_rule=None)
        sys.modules["jestimator"] = package


def t5x_parameters(weights: dict[str, np.ndarray]) -> dict[str, Any]:
    """The neutral weights as T5X's parameter tree (examples/t5/network.py)."""

    def attention(name: str) -> dict[str, Any]:
        parts = {"query": "q", "key": "k", "value": "v", "out": "o"}
        return {theirs: {"kernel": weights[f"{name}.{ours}"]} for theirs, ours in parts.items()}

    def stack(name: str) -> dict[str, Any]:
        tree: dict[str, Any] = {
            "relpos_bias": {"rel_embedding": weights[f"{name}.bias"].T},
            f"{name}_norm": {"scale": weights[f"{name}.norm"]},
        }
        blocks = (
            {"self": ("attention", "pre_attention_layer_norm")}
            if name == "encoder"
            else {
                "self": ("self_attention", "pre_self_attention_layer_norm"),
                "cross": ("encoder_decoder_attention", "pre_cross_attention_layer_norm"),
            }
        )
        for layer in range(NUM_LAYERS):
            mlp = f"{name}.{layer}.mlp"
            tree[f"layers_{layer}"] = {
                "mlp": {
                    part: {"kernel": weights[f"{mlp}.{part}"]} for part in ("wi_0", "wi_1", "wo")
                },
                "pre_mlp_layer_norm": {"scale": weights[f"{mlp}.norm"]},
            }
            for block, (module, norm) in blocks.items():
                path = f"{name}.{layer}.{block}"
                tree[f"layers_{layer}"][module] = attention(path)
                tree[f"layers_{layer}"][norm] = {"scale": weights[f"{path}.norm"]}
        return tree

    tree = {"encoder": stack("encoder"), "decoder": stack("decoder")}
    tree["decoder"]["logits_dense"] = {"kernel": weights["head"]}
    tree["token_embedder"] = {"embedding": weights["embedding"]}
    return tree


def make_t5x(
    weights: dict[str, np.ndarray], batch: dict[str, np.ndarray], optimizer: str
) -> System:
    """T5X's network, loss, optimizer and the partitioned step of its Trainer."""
    stub_unpublished_modules()
    import jax
    import jax.numpy as jnp
    from flax import core as flax_core
    from t5x import adafactor, models, optimizers, partitioning, trainer, utils
    from t5x.examples.t5 import network

    if optimizer == "adafactor":
        definition = adafactor.Adafactor(
            decay_rate=0.8,
            step_offset=0,
            logical_factor_rules=adafactor.standard_logical_factor_rules(),
        )
    else:
        definition = optimizers.adamw(
            learning_rate=LEARNING_RATE, b1=0.9, b2=0.95, weight_decay=0.0
        )
    config = network.T5Config(
        vocab_size=VOCAB_SIZE, dtype="float32", emb_dim=EMBED_DIM, num_heads=NUM_HEADS,
        num_encoder_layers=NUM_LAYERS, num_decoder_layers=NUM_LAYERS, head_dim=HEAD_DIM,
        mlp_dim=MLP_DIM, mlp_activations=("gelu", "linear"), dropout_rate=0.0,
        logits_via_embedding=False,
    )  # fmt: skip
    targets = number_of_targets(batch)
    model = models.EncoderDecoderModel(
        module=network.Transformer(config), input_vocabulary=None, output_vocabulary=None,
        optimizer_def=definition, z_loss=Z_LOSS, loss_normalizing_factor=float(targets),
    )  # fmt: skip
    partitioner = partitioning.PjitPartitioner(num_partitions=1)
    initializer = utils.TrainStateInitializer(
        optimizer_def=definition, init_fn=model.get_initial_variables, partitioner=partitioner,
        input_shapes={name: value.shape for name, value in batch.items()},
    )  # fmt: skip
    state = initializer.from_scratch(jax.random.PRNGKey(0))
    params = jax.tree.map(jnp.asarray, t5x_parameters(weights))
    if isinstance(state.params, flax_core.FrozenDict):
        params = flax_core.freeze(params)
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, state.params)
    run = trainer.Trainer(
        model=model, train_state=state.replace_params(params), partitioner=partitioner,
        eval_names=[], summary_dir=None, train_state_axes=initializer.train_state_axes,
        rng=jax.random.PRNGKey(0),
        learning_rate_fn=lambda step: jnp.float32(LEARNING_RATE), num_microbatches=None,
    )  # fmt: skip
    run.compile_train(batch)
    box = [run.train_state]

    def step() -> float:
        box[0], metrics = run._compiled_train_step(box[0], batch)
        jax.block_until_ready(box[0])
        return float(metrics["cross_ent_loss"].total)

    return System(step, common.versions("jax", "flax", "optax"))


def hf_model(weights: dict[str, np.ndarray]) -> Any:
    """Hugging Face's T5 in eager torch with the neutral weights, head and embedding apart."""
    import torch
    import transformers

    config = transformers.T5Config(
        vocab_size=VOCAB_SIZE, d_model=EMBED_DIM, d_kv=HEAD_DIM, d_ff=MLP_DIM, num_heads=NUM_HEADS,
        num_layers=NUM_LAYERS, num_decoder_layers=NUM_LAYERS, feed_forward_proj="gated-gelu",
        dropout_rate=0.0, tie_word_embeddings=False, decoder_start_token_id=0,
    )  # fmt: skip
    model = transformers.T5ForConditionalGeneration(config)
    model.lm_head.weight = torch.nn.Parameter(torch.empty(VOCAB_SIZE, EMBED_DIM))
    model.config.scale_decoder_outputs = False
    left = dict(model.named_parameters())

    def load(name: str, value: np.ndarray) -> None:
        parameter = left.pop(name)
        assert parameter.shape == value.shape, (name, parameter.shape, value.shape)
        parameter.data.copy_(torch.from_numpy(np.ascontiguousarray(value)))

    load("shared.weight", weights["embedding"])
    load("lm_head.weight", weights["head"].T)
    modules = {"self": "SelfAttention", "cross": "EncDecAttention"}
    for stack, blocks in (("encoder", ("self", "mlp")), ("decoder", ("self", "cross", "mlp"))):
        first = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        load(first, weights[f"{stack}.bias"])
        load(f"{stack}.final_layer_norm.weight", weights[f"{stack}.norm"])
        for layer in range(NUM_LAYERS):
            for number, block in enumerate(blocks):
                there = f"{stack}.block.{layer}.layer.{number}"
                here = f"{stack}.{layer}.{block}"
                load(f"{there}.layer_norm.weight", weights[f"{here}.norm"])
                parts = ("wi_0", "wi_1", "wo") if block == "mlp" else ("q", "k", "v", "o")
                module = modules.get(block, "DenseReluDense")
                for part in parts:
                    load(f"{there}.{module}.{part}.weight", weights[f"{here}.{part}"].T)
    assert not left, f"not loaded: {sorted(left)}"
    assert sum(p.numel() for p in model.parameters()) == sum(w.size for w in weights.values())
    return model


def make_hf(weights: dict[str, np.ndarray], batch: dict[str, np.ndarray], optimizer: str) -> System:
    """Hugging Face's T5 in eager torch; Adafactor is the one of transformers, AdamW torch's."""
    import torch
    from transformers.optimization import Adafactor

    model = hf_model(weights)
    parameters = list(model.parameters())
    if optimizer == "adamw":
        update = torch.optim.AdamW(parameters, LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    else:
        update = Adafactor(parameters, lr=LEARNING_RATE, scale_parameter=True, relative_step=False)
    tensors = {name: torch.from_numpy(value.astype(np.int64)) for name, value in batch.items()}
    inputs, labels = tensors["encoder_input_tokens"], tensors["decoder_target_tokens"]
    labels = torch.where(labels > 0, labels, -100)
    mask = (inputs > 0).long()

    def step() -> float:
        update.zero_grad(set_to_none=True)
        loss = model(input_ids=inputs, attention_mask=mask, labels=labels).loss
        loss.backward()
        update.step()
        return loss.item()

    model.train()
    threads = f"{torch.get_num_threads()} threads"
    return System(step, f"{common.versions('torch', 'transformers')}, {threads}")


def our_config(**changes: Any) -> Any:
    """Our configuration of the model; `changes` are further fields of it."""
    from chatyuan.models import ModelConfig

    return ModelConfig(
        vocab_size=VOCAB_SIZE, embed_dim=EMBED_DIM, mlp_dim=MLP_DIM, num_heads=NUM_HEADS,
        head_dim=HEAD_DIM, num_encoder_layers=NUM_LAYERS, num_decoder_layers=NUM_LAYERS, **changes,
    )  # fmt: skip


def our_parameters(weights: dict[str, np.ndarray]) -> dict[str, Any]:
    """The neutral weights as our parameter tree: T5X's names, layers stacked on axis 0."""

    def stack(name: str) -> dict[str, Any]:
        def stacked(part: str) -> np.ndarray:
            return np.stack([weights[f"{name}.{layer}.{part}"] for layer in range(NUM_LAYERS)])

        def attention(block: str) -> dict[str, Any]:
            parts = {"query": "q", "key": "k", "value": "v", "out": "o"}
            return {ours: {"kernel": stacked(f"{block}.{part}")} for ours, part in parts.items()}

        layers = {
            "self_attention": attention("self"),
            "pre_self_attention_layer_norm": {"scale": stacked("self.norm")},
            "mlp": {part: {"kernel": stacked(f"mlp.{part}")} for part in ("wi_0", "wi_1", "wo")},
            "pre_mlp_layer_norm": {"scale": stacked("mlp.norm")},
        }
        if name == "decoder":
            layers["encoder_decoder_attention"] = attention("cross")
            layers["pre_cross_attention_layer_norm"] = {"scale": stacked("cross.norm")}
        return {
            "layers": layers,
            "relpos_bias": {"rel_embedding": np.ascontiguousarray(weights[f"{name}.bias"].T)},
            "final_norm": {"scale": weights[f"{name}.norm"]},
        }

    return {
        "token_embedder": {"embedding": weights["embedding"]},
        "encoder": stack("encoder"),
        "decoder": stack("decoder"),
        "logits_dense": {"kernel": weights["head"]},
    }


def make_ours(
    weights: dict[str, np.ndarray], batch: dict[str, np.ndarray], optimizer: str, changes: dict
) -> System:
    """Our model, loss, optimizer and jitted step, with every default of the library.

    Args:
        weights: see `make_weights`.
        batch: see `make_batch`.
        optimizer: 'adafactor' or 'adamw'.
        changes: fields of ModelConfig to set.
    """
    from chatyuan.stages import _host

    _host.configure()  # as run.py does
    import jax
    import jax.numpy as jnp

    _host.imported()

    from chatyuan.models import build
    from chatyuan.models.loss import LossConfig, supervised_loss
    from chatyuan.train.optimizers import OptimizerConfig, make_optimizer
    from chatyuan.train.schedules import ScheduleConfig, make_schedule
    from chatyuan.train.state import init_state
    from chatyuan.train.step import make_train_step

    config = our_config(**changes)
    model = build(config)
    loss_fn = supervised_loss(model, LossConfig(z_loss=Z_LOSS))
    schedule = make_schedule(ScheduleConfig(name="constant", learning_rate=LEARNING_RATE))
    settings = {"b1": 0.9, "b2": 0.95, "weight_decay": 0.0} if optimizer == "adamw" else {}
    update = make_optimizer(
        OptimizerConfig(name=optimizer, **settings),
        schedule,
        model.abstract_params(),
        model.logical_axes(),
    )
    params = jax.tree.map(jnp.asarray, our_parameters(weights))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, model.abstract_params())
    rows = {
        **batch,
        "encoder_segment_ids": (batch["encoder_input_tokens"] > 0).astype(np.int32),
        "decoder_segment_ids": (batch["decoder_target_tokens"] > 0).astype(np.int32),
    }
    box = [init_state(params, update)]
    train_step = make_train_step(loss_fn, update, schedule, seed=0)

    def step() -> float:
        box[0], metrics = train_step(box[0], rows)
        total, weight = metrics["loss"]
        jax.block_until_ready(box[0])
        return float(total) / float(weight)

    def flops_ratio() -> float:
        # XLA counts the body of a loop once, and blocked attention is a loop.
        whole = build(dataclasses.replace(config, attention_implementation="dense"))
        loss = supervised_loss(whole, LossConfig(z_loss=Z_LOSS))
        return compiled_flops(loss, whole, rows) / counted_flops(config, batch)

    versions = common.versions("jax", "flax", "optax")
    return System(step, versions, flops_ratio, state=lambda: box[0])


def counted_flops(config: Any, batch: dict[str, np.ndarray]) -> float:
    """FLOPs of a step over the batch by the library's own formula."""
    from chatyuan.models.config import flops_per_example

    rows, input_length = batch["encoder_input_tokens"].shape
    return rows * flops_per_example(config, input_length, batch["decoder_target_tokens"].shape[1])


def compiled_flops(loss_fn: Callable[..., Any], model: Any, rows: dict[str, np.ndarray]) -> float:
    """FLOPs that XLA counts in the loss and its gradient; needs unrolled layers."""
    import jax

    def mean_loss(params: Any, batch: dict[str, Any]) -> Any:
        total, weight, _ = loss_fn(params, batch, None)
        return total / weight

    compiled = jax.jit(jax.grad(mean_loss)).lower(model.abstract_params(), rows).compile()
    return float(compiled.cost_analysis()["flops"])


def serve(arguments: argparse.Namespace) -> None:
    """The worker's side: builds the system, takes the first step, then steps when told to."""
    if arguments.worker == "t5x":
        sys.path.insert(0, arguments.t5x_path)
    weights = dict(np.load(arguments.weights))
    batch = make_batch(*SHAPES[arguments.shape])
    make = {"t5x": make_t5x, "hf": make_hf}.get(arguments.worker)
    if make is None:
        system = make_ours(weights, batch, arguments.optimizer, json.loads(arguments.model))
    else:
        system = make(weights, batch, arguments.optimizer)
    weights.clear()
    losses = [system.step() for _ in range(3)]
    common.reply(losses=losses, description=system.description)
    for command in common.commands():
        if command["command"] == "run":
            start, busy = time.perf_counter(), time.process_time()
            for _ in range(arguments.steps_per_run):
                loss = system.step()
            seconds = (time.perf_counter() - start) / arguments.steps_per_run
            busy = (time.process_time() - busy) / arguments.steps_per_run
            common.reply(seconds=[seconds], cpu_seconds=[busy], loss=loss)
        elif command["command"] == "memory":
            common.reply(peak_mib=common.peak_rss_mib())
        elif command["command"] == "flops":
            common.reply(ratio=None if system.flops_ratio is None else system.flops_ratio())


# ------------------------------------------------------------------------------------------ driver


def start_workers(arguments: argparse.Namespace, weights: str, shape: str, optimizer: str) -> list:
    """Starts one process per system; the peers that are not there are left out."""
    python = {"ours": sys.executable, "t5x": arguments.t5x_python, "hf": arguments.hf_python}
    names = ["ours", *(["t5x"] if arguments.t5x_path else []), *([] if arguments.no_hf else ["hf"])]
    workers = []
    for name in names:
        command = [
            python[name], __file__, f"--worker={name}", f"--weights={weights}", f"--shape={shape}",
            f"--optimizer={optimizer}", f"--steps_per_run={arguments.steps_per_run}",
            f"--t5x_path={arguments.t5x_path}", f"--model={arguments.model}",
        ]  # fmt: skip
        quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "HF_HUB_OFFLINE": "1"}
        workers.append(common.Worker(name, command, quiet))
    return workers


def measure(
    arguments: argparse.Namespace, weights: str, shape: str, optimizer: str
) -> dict[str, Any]:
    """Starts, compares and times the systems on one shape with one optimizer."""
    workers = start_workers(arguments, weights, shape, optimizer)
    try:
        started = {worker.name: worker.answer() for worker in workers}
        reference = started["ours"]["losses"][0]
        for name, answer in started.items():
            losses = " ".join(f"{loss:.6f}" for loss in answer["losses"])
            print(f"  {name}: {answer['description']}; first losses {losses}")
            if abs(answer["losses"][0] - reference) > LOSS_TOLERANCE * abs(reference):
                raise SystemExit(
                    f"{name}'s first loss {answer['losses'][0]!r} is not ours, {reference!r}: "
                    "the systems do not compute the same thing, so their times are not compared"
                )
        timings = common.take_turns(workers, runs=arguments.runs)
        peaks = {worker.name: worker.ask("memory")["peak_mib"] for worker in workers}
        flops = workers[0].ask("flops")["ratio"]
    finally:
        for worker in workers:
            worker.close()
    for name, timing in timings.items():
        print(f"  {name}: {timing}, peak {peaks[name]:.0f} MiB")
    print(f"  ours: compiled FLOPs / counted FLOPs {flops:.4f}")
    return {"started": started, "timings": timings, "peaks": peaks, "flops": flops}


def row(shape: str, optimizer: str, result: dict[str, Any], device: str) -> list[str]:
    """The line of RESULTS.md for one measurement."""
    timings, peaks = result["timings"], result["peaks"]

    def ratio(name: str) -> str:
        return f"{timings[name].median / timings['ours'].median:.2f}" if name in timings else "-"

    return [
        common.today(), device, result["started"]["ours"]["description"], common.commit(), shape,
        optimizer, *(str(timings.get(name, "-")) for name in ("ours", "t5x", "hf")),
        ratio("t5x"), ratio("hf"),
        "/".join(f"{peaks[n]:.0f}" if n in peaks else "-" for n in ("ours", "t5x", "hf")),
    ]  # fmt: skip


def checks(shape: str, optimizer: str, result: dict[str, Any]) -> list[common.Check]:
    """The goals of this benchmark that apply to one measurement."""
    timings, peaks, found = result["timings"], result["peaks"], []
    for name, (goal, floor) in TARGETS.items():
        # Hugging Face users train with AdamW; its Adafactor is a Python loop and an easy mark.
        if name in timings and (name, optimizer) != ("hf", "adafactor"):
            speed = timings[name].median / timings["ours"].median
            label = f"{shape} {optimizer} against {name}"
            found.append(common.Check(label, speed, goal, floor, unit="x"))
    if "t5x" in peaks:
        memory = peaks["ours"] / peaks["t5x"]
        label = f"{shape} {optimizer} peak memory"
        found.append(common.Check(label, memory, 0.5, at_most=True, unit="x"))
    label, (low, high) = f"{shape} compiled FLOPs / counted", FLOPS_RANGE
    found.append(common.Check(label, result["flops"], low))
    found.append(common.Check(label, result["flops"], high, at_most=True))
    return found


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line; `--worker` and what follows it are for this program's own processes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    common.add_common_flags(parser)
    here = sys.executable
    parser.add_argument(
        "--t5x_path", default="", help="a clone of google-research/t5x; else skipped"
    )
    parser.add_argument("--t5x_python", default=here, help="the Python with T5X's dependencies")
    parser.add_argument("--hf_python", default=here, help="the Python with torch and transformers")
    parser.add_argument("--no_hf", action="store_true", help="leave Hugging Face out")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES)[:2])
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--steps_per_run", type=int, default=2)
    parser.add_argument(
        "--model", default="{}", metavar="JSON",
        help='fields of our ModelConfig to change, such as \'{"scan_layers": true}\'',
    )  # fmt: skip
    for name in ("worker", "weights", "shape", "optimizer"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main(arguments: argparse.Namespace) -> int:
    """Measures every shape with every optimizer and prints the verdict."""
    device = common.cpu_name()
    common.print_configuration(
        "train step, T5 1.1: D 256, F 512 gated gelu, 4 heads x 64, 4+4 layers, V 32128, float32",
        {
            "device": device, "commit": common.commit(), "runs": arguments.runs,
            "T5X": arguments.t5x_path or "skipped: no --t5x_path given",
            "our options": arguments.model,
        },
    )  # fmt: skip
    found: list[common.Check] = []
    with tempfile.TemporaryDirectory() as folder:
        weights = pathlib.Path(folder) / "weights.npz"
        make_weights(weights)
        for shape in arguments.shapes:
            for optimizer in arguments.optimizers:
                print(f"{shape}, {optimizer}")
                result = measure(arguments, str(weights), shape, optimizer)
                found += checks(shape, optimizer, result)
                if not arguments.no_record:
                    line = row(shape, optimizer, result, device)
                    common.append_rows("Train step", COLUMNS, [line])
    return common.finish(found, arguments.check)


if __name__ == "__main__":
    options = parse()
    sys.exit(serve(options) if options.worker else main(options))

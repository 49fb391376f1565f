"""Predicted memory beside XLA's own memory analysis, for five configurations, small to large.

    python benchmarks/plan.py --check [--no_record]

Backend: CPU, on which nothing is run, only compiled, with layers scanned. XLA's figures are those
of `memory_analysis` alone:
state (weights and optimizer) = arguments of the step - the batch; gradients = outputs of the
compiled gradient function; activations = temporaries of the step - gradients (that includes XLA's
scratch, which the prediction estimates as one layer's or the loss's workspace).
"""

import argparse
import os
import sys
from typing import Any

import common

COLUMNS = ("date", "versions", "commit", "backend", "configuration", "state", "gradients",
           "activations: XLA MiB", "predicted MiB", "ratio")  # fmt: skip
# name -> (model, rows, lengths, optimizer, devices of fsdp)
SMALL = {"embed_dim": 128, "mlp_dim": 256, "num_heads": 2, "num_encoder_layers": 2,
         "num_decoder_layers": 2, "vocab_size": 2048}  # fmt: skip
MIDDLE = {"embed_dim": 256, "mlp_dim": 512, "num_heads": 4, "num_encoder_layers": 4,
          "num_decoder_layers": 4, "vocab_size": 8192}  # fmt: skip
LARGE = {"embed_dim": 768, "mlp_dim": 2048, "num_heads": 12, "num_encoder_layers": 12,
         "num_decoder_layers": 12, "vocab_size": 32128}  # fmt: skip
LM = {"architecture": "prefix_lm", "causal_only": True, "position": "rope",
      "mlp_activations": ("silu", "linear")}  # fmt: skip
CASES = {
    "encoder-decoder 1M": (SMALL, 8, (128, 32), "adamw"),
    "encoder-decoder 10M, selective": ({**MIDDLE, "remat": "selective"}, 8, (256, 64), "adafactor"),
    "prefix LM 7M, dots": ({**MIDDLE, **LM, "remat": "dots"}, 8, (256, 0), "adamw"),
    "prefix LM 7M, bfloat16": ({**MIDDLE, **LM, "dtype": "bfloat16"}, 8, (256, 0), "adamw"),
    "encoder-decoder 248M, full": ({**LARGE, "remat": "full"}, 8, (512, 114), "adamw"),
}


def measure(name: str) -> dict[str, Any]:
    """Compiles one configuration; returns predicted and measured bytes."""
    import jax

    from chatyuan import sharding
    from chatyuan.models import build
    from chatyuan.models.config import ModelConfig
    from chatyuan.models.loss import supervised_loss
    from chatyuan.planning.activations import abstract_batch
    from chatyuan.planning.memory import abstract_state, predict
    from chatyuan.train.optimizers import OptimizerConfig, make_optimizer
    from chatyuan.train.schedules import ScheduleConfig, make_schedule
    from chatyuan.train.step import make_train_step

    sizes, rows, lengths, kind = CASES[name]
    model = build(ModelConfig(scan_layers=True, **sizes))
    state = abstract_state(model, OptimizerConfig(name=kind))
    mesh = sharding.abstract_mesh({"data": 1}, 1)
    found, _ = predict(model, state, mesh, batch_size=rows, lengths=lengths, platform="cpu")
    schedule = make_schedule(ScheduleConfig(name="constant"))
    params = model.abstract_params()
    optimizer = make_optimizer(OptimizerConfig(name=kind), schedule, params, model.logical_axes())
    loss, batch = supervised_loss(model), abstract_batch(model.config, rows, lengths)
    gradient = jax.jit(jax.grad(lambda p, b: loss(p, b, None)[0]))
    gradients = gradient.lower(params, batch).compile().memory_analysis().output_size_in_bytes
    step = make_train_step(loss, optimizer, schedule).lower(state, batch).compile()
    analysis = step.memory_analysis()
    of_batch = sum(leaf.size * leaf.dtype.itemsize for leaf in batch.values())
    return {
        "state": (found.weights + found.optimizer, analysis.argument_size_in_bytes - of_batch),
        "gradients": (found.gradients, gradients),
        "activations": (found.activations.total, analysis.temp_size_in_bytes - gradients),
    }


def main() -> int:
    """Compiles, prints, records, judges."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--check", action="store_true", help="exit 1 where a goal is missed")
    parser.add_argument("--no_record", action="store_true", help="leave RESULTS.md as it is")
    arguments = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    versions, commit = common.versions("jax", "jaxlib", "flax"), common.commit()
    common.print_configuration(
        "Predicted memory beside XLA's", {"versions": versions, "commit": commit, "backend": "cpu"}
    )
    checks, rows = [], []
    for name in arguments.cases:
        found = measure(name)
        ratios = {kind: predicted / xla for kind, (predicted, xla) in found.items()}
        predicted, xla = (size / 2**20 for size in found["activations"])
        shown = ", ".join(f"{kind} {ratio:.3f}" for kind, ratio in ratios.items())
        print(f"{name}: {shown} of XLA's; MiB {predicted:,.1f} of {xla:,.1f}", flush=True)
        for kind, ratio in ratios.items():
            goal = 25 if kind == "activations" else 1
            off = 100 * abs(ratio - 1)
            checks.append(common.Check(f"{name} {kind} off by", off, goal, at_most=True, unit=" %"))
        rows.append([
            common.today(), versions, commit, "cpu", name, f"{ratios['state']:.4f}",
            f"{ratios['gradients']:.4f}", f"{xla:,.1f}", f"{predicted:,.1f}",
            f"{ratios['activations']:.3f}",
        ])  # fmt: skip
    if not arguments.no_record:
        common.append_rows("Predicted memory", COLUMNS, rows)
    return common.finish(checks, "goal" if arguments.check else None)


if __name__ == "__main__":
    sys.exit(main())

"""XLA's flags that let devices compute while they communicate, for each kind of device.

1. XLA starts a collective early and waits for it late, if it may move it: out of the iteration of
   the loop over layers that needs it, or past other work. These flags allow that.
2. A flag is here when public documentation suggests it, it exists in what `constraints.txt` and
   the extras install (jaxlib 0.10.2, libtpu 0.0.42), and it is not on by default. On by default
   are, on TPUs, asynchronous all-gather and collective-permute and their fusion with other work;
   on GPUs, asynchronous collectives and pipelined reduce-scatter.
3. Left out because they cost memory, which plans do not count, or compile time:
   `xla_tpu_data_parallel_opt_different_sized_ops`, `xla_gpu_enable_while_loop_double_buffering`.
4. libtpu and jaxlib end a process that has a flag they do not know, so flags are set for installed
   plugins only. What the user's environment sets is kept, flag by flag; CHATYUAN_OVERLAP=0 adds
   none.

Sources: openxla.org/xla/flags_guidance (TPU), openxla.org/xla/gpu_optimization_levels (GPU),
docs.jax.dev/en/latest/xla_flags.html, XLA's debug_options_flags.cc for defaults. The guidance
writes kEnabled where libtpu reads "enabled".
"""

import os
from collections.abc import Iterable

from chatyuan.errors import UserError

SWITCH = "CHATYUAN_OVERLAP"
# Kind -> the environment variable that its compiler reads.
VARIABLES = {"gpu": "XLA_FLAGS", "tpu": "LIBTPU_INIT_ARGS"}
# Kind -> flag, its value and why.
FLAGS: dict[str, dict[str, tuple[str, str]]] = {
    "gpu": {
        "xla_gpu_enable_latency_hiding_scheduler": (
            "true",
            "orders a program so that computation lies between the start and the end of each "
            "collective; without it they overlap by chance",
        ),
        "xla_gpu_enable_pipelined_all_gather": (
            "true",
            "gathers the next layer's weights while this layer computes (fsdp, scanned layers)",
        ),
        "xla_gpu_enable_pipelined_all_reduce": (
            "true",
            "adds up a layer's gradients while the next one's are computed (data, scanned layers)",
        ),
    },
    "tpu": {
        "xla_tpu_enable_async_collective_fusion_fuse_all_reduce": (
            "true",
            "all-reduces run beside the computation fused with them, as all-gathers do by default",
        ),
        "xla_tpu_enable_ici_ag_pipelining": (
            "true",
            "gathers the next layer's weights, inside a slice, while this layer computes; the next "
            "two belong to it",
        ),
        "xla_should_allow_loop_variant_parameter_in_chain": (
            "enabled",
            "lets the pipelined gather begin at a loop's variable: the slice of scanned weights",
        ),
        "xla_should_add_loop_invariant_op_in_chain": (
            "enabled",
            "lets it take along operations that are the same in each iteration",
        ),
        "xla_tpu_enable_data_parallel_all_reduce_opt": (
            "true",
            "gradients' all-reduces across slices (DCN), the slowest link, overlap the backward "
            "pass",
        ),
    },
}


def apply(kinds: Iterable[str]) -> None:
    """Adds the flags of these kinds of devices to the environment; before jax starts.

    Raises:
      UserError: CHATYUAN_OVERLAP is neither 0 nor 1.
    """
    wanted = os.environ.get(SWITCH, "1")
    if wanted not in ("0", "1"):
        raise UserError(
            f"{SWITCH}={wanted} should be 0 (no flags for overlap are set) or 1, the default."
        )
    if wanted == "0":
        return
    for kind in kinds:
        variable = VARIABLES[kind]
        given = os.environ.get(variable, "").split()
        known = {word.lstrip("-").partition("=")[0] for word in given}
        added = [
            f"--{name}={value}"
            for name, (value, _) in FLAGS[kind].items()
            if not known & {name, f"no{name}"}
        ]
        os.environ[variable] = " ".join([*given, *added])

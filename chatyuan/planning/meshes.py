"""Meshes for a number of devices, compared by what fits and by the time of a step."""

import dataclasses
import math
from typing import Any

from chatyuan import sharding
from chatyuan.errors import UserError
from chatyuan.models import Model, pipeline
from chatyuan.models.communication import step_communication
from chatyuan.models.config import flops_per_example
from chatyuan.planning.activations import row_lengths
from chatyuan.planning.devices import Device
from chatyuan.planning.memory import Memory, predict
from chatyuan.sharding import ShardingConfig

USABLE = 0.92  # of a device's memory; the rest is the runtime's and lost between buffers


@dataclasses.dataclass(frozen=True)
class Job:
    """What is to be trained and on what.

    Attributes:
        model: of `chatyuan.models.build`.
        state: of `memory.abstract_state`.
        device: of `devices.DEVICES`.
        count: how many of them.
        batch_size: sequences of the global batch.
        lengths: (INPUT_LENGTH, TARGET_LENGTH).
        microbatches: parts of the batch.
        mfu: share of the peak that the model's FLOPs reach while nothing waits for communication.
    """

    model: Model
    state: Any
    device: Device
    count: int
    batch_size: int
    lengths: tuple[int, int]
    microbatches: int
    mfu: float

    @property
    def flops(self) -> float:
        """FLOPs of one step, recomputation not counted."""
        return self.batch_size * flops_per_example(self.model.config, *self.lengths)


@dataclasses.dataclass(frozen=True)
class Choice:
    """One mesh and what follows from it; `error` says why it is impossible.

    Attributes:
        name: of the strategy.
        mesh: as `MESH` is written.
        memory: of one device.
        sent: wire bytes that a device sends a step, by kind of collective.
        compute: seconds of a step at the stated MFU, a pipeline's bubble included.
        communication: seconds of its collectives at the links' full rate.
        fits: whether the memory suffices.
        largest_batch: the largest power-of-two multiple of sequences that fits; 0 = none.
        error: of the mesh.
    """

    name: str
    mesh: dict[str, int]
    memory: Memory | None = None
    sent: dict[str, float] = dataclasses.field(default_factory=dict)
    compute: float = math.inf
    communication: float = math.inf
    fits: bool = False
    largest_batch: int = 0
    error: str = ""

    @property
    def seconds(self) -> float:
        """Of one step: max(compute, communication), as if the shorter hid behind the longer."""
        return max(self.compute, self.communication)


def candidates(count: int, group: int) -> dict[str, tuple[dict[str, int], ShardingConfig]]:
    """Returns name -> (MESH, strategy) of the meshes worth comparing.

    Args:
        count: devices.
        group: devices that the fast links connect.
    """
    inside = min(count, group)
    plain = ShardingConfig()
    found = {
        "data parallel": ({"data": count}, plain),
        "ZeRO-1": ({"data": count}, ShardingConfig(zero_stage=1)),
        "ZeRO-3 (fsdp)": ({"fsdp": count}, plain),
    }
    if count > inside and count % inside == 0:
        found["hybrid"] = ({"data": count // inside, "fsdp": inside}, plain)
    elif count >= 4 and count % 2 == 0:
        found["hybrid"] = ({"data": 2, "fsdp": count // 2}, plain)
    for tensor in (2, 4, 8):
        if count % tensor == 0 and tensor <= inside and count > tensor:
            found[f"fsdp x tensor {tensor}"] = ({"fsdp": count // tensor, "tensor": tensor}, plain)
    return found


def evaluate(name: str, mesh: dict[str, int], strategy: ShardingConfig, job: Job) -> Choice:
    """Returns what a mesh makes of a job; an impossible mesh is a Choice with its `error`."""
    try:
        abstract = sharding.abstract_mesh(mesh, job.count)
        sharding.check_batch(job.batch_size, abstract, job.microbatches)
        pipeline.check_pipeline(job.model.config, job.batch_size // job.microbatches, abstract)

        def at(batch_size: int) -> Any:
            return predict(
                job.model,
                job.state,
                abstract,
                batch_size=batch_size,
                lengths=job.lengths,
                platform=job.device.platform,
                strategy=strategy,
                microbatches=job.microbatches,
            )

        memory, placement = at(job.batch_size)
        of_encoder, of_decoder = row_lengths(job.model.config, job.lengths)
        collectives = step_communication(
            job.model,
            placement,
            abstract,
            rows=job.batch_size,
            input_length=of_encoder or of_decoder,
            target_length=of_decoder if of_encoder else 0,
            microbatches=job.microbatches,
            platform=job.device.platform,
        )
    except UserError as error:
        return Choice(name, mesh, error=str(error))
    limit = job.device.memory * 2**30 * USABLE
    unit = math.prod(abstract.shape[axis] for axis in sharding.RULES["batch"]) * job.microbatches
    largest = 0
    while unit <= 2**20 and at(unit)[0].total <= limit:
        largest, unit = unit, 2 * unit
    seconds = 0.0
    for collective in collectives:
        # A collective that leaves the group is as slow as the network.
        inside = math.prod(abstract.shape[a] for a in abstract.shape if a in collective.axes)
        spans = job.count > job.device.group and (
            inside > job.device.group or "data" in collective.axes
        )
        rate = job.device.network if spans else job.device.link
        seconds += collective.wire_bytes / rate
    sent: dict[str, float] = {}
    for collective in collectives:
        sent[collective.kind] = sent.get(collective.kind, 0.0) + collective.wire_bytes
    config, stages = job.model.config, pipeline.stages_of(abstract)
    bubble = pipeline.bubble_fraction(
        stages, pipeline.microbatches_of(config, stages), config.pipeline_repeats
    )
    return Choice(
        name,
        mesh,
        memory=memory,
        sent=sent,
        compute=job.flops / (job.count * job.device.peak * job.mfu) / (1 - bubble),
        communication=seconds,
        fits=memory.total <= limit,
        largest_batch=largest,
    )


def recommend(choices: list[Choice]) -> tuple[Choice | None, str]:
    """Returns the fastest mesh that fits, and why; None if none does."""
    possible = [choice for choice in choices if not choice.error]
    fitting = [choice for choice in possible if choice.fits]
    if not fitting:
        least = min(possible, key=lambda c: c.memory.total, default=None)
        if least is None:
            return None, "no mesh divides this batch and model; change BATCH_SIZE"
        return None, (
            f"nothing fits; {least.name} comes closest with "
            f"{least.memory.total / 2**30:.1f} GiB. Raise MICROBATCHES, then set ModelConfig.remat "
            "to 'dots' or 'full', then take more or larger devices"
        )
    # Equal times go to the mesh that sends least, then to the one with most room.
    best = min(fitting, key=lambda c: (round(c.seconds, 6), c.communication, c.memory.total))
    bound = "computation" if best.compute >= best.communication else "communication"
    return best, (
        f"of the {len(fitting)} that fit it has the shortest step ({bound} decides) and sends "
        f"least among equals"
    )

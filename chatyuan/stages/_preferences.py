"""What the stages that learn from preferences share: their data, its costs and its report."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import jax
import numpy as np

from chatyuan import configs, plots, report, sharding
from chatyuan.align.answers import Answers
from chatyuan.data.loader import DataConfig
from chatyuan.data.preferences import PreferenceLoader
from chatyuan.errors import UserError
from chatyuan.evaluate import preferences
from chatyuan.metrics import quantity
from chatyuan.models import Model
from chatyuan.models.config import flops_per_example
from chatyuan.ops.platform import target_platform
from chatyuan.planning import memory
from chatyuan.stages import _run_folder, _supervised
from chatyuan.text.vocabulary import Vocabulary

PAIRS_FILE, PLOT = "pairs.json", "accuracy_by_gap.png"


def answers_of(batch: Mapping[str, jax.Array]) -> Answers:
    """Returns the prompts and answers of a batch of `PreferenceLoader`."""
    return Answers(
        batch["prompts"], batch["prompt_lengths"], batch["answers"], batch["answer_lengths"]
    )


def check_data(data: DataConfig) -> None:
    """Raises UserError for settings of the data that preferences do not have."""
    for name in ("batch_ramp", "concatenate"):
        if getattr(data, name):
            raise UserError(f"DataConfig.{name} does not apply to preferences; leave it out.")


def open_data(
    config: Any, make_loader: Callable[..., PreferenceLoader] = PreferenceLoader
) -> tuple[Vocabulary, jax.sharding.Mesh, Any, Any]:
    """Opens and checks what does not depend on the loss.

    Args:
        config: the run.
        make_loader: `(data config, vocabulary, shuffle=True)` -> loader.

    Returns:
        vocabulary, mesh, the loader, and that of the held-out split or None.

    Raises:
        UserError: anything that would stop the run later.
    """
    vocabulary, mesh = _supervised.open_alone(config)
    loader, evaluation = make_loader(config.data, vocabulary), None
    if config.eval_split is not None:
        _supervised.check_eval_split(config)
        held_out = dataclasses.replace(config.data, split=config.eval_split)
        evaluation = make_loader(held_out, vocabulary, shuffle=False)
    return vocabulary, mesh, loader, evaluation


class Parts(_supervised.Parts):
    """A model and preferences; the loss is the stage's own."""

    # Whether the decoder also reads the answers' end, and has no use for logits.
    reads_end: ClassVar[bool] = False

    @property
    def language_model(self) -> Model:
        """The model without what the stage has put on it."""
        return self.model

    @property
    def columns(self) -> int:
        """Answers that are computed for each prompt."""
        return self.loader.answers

    def held_out(
        self, compute: Callable[..., Any], params: Any, *names: str
    ) -> tuple[np.ndarray, ...]:
        """Returns `compute(params, batch)` of the held-out prompts, and features of the batches.

        Args:
            compute: jitted, gives an array of one row a prompt.
            params: of the model.
            names: of the features; `[N, ...]` each, prompts that fill up a batch left out.
        """
        columns = []
        for batch in _supervised.spread(self.evaluation, self.config.eval_batches):
            values = np.asarray(compute(params, sharding.shard_batch(batch, self.mesh)))
            real = batch["rows"] >= 0
            columns.append([values[real], *(batch[name][real] for name in names)])
        return tuple(np.concatenate(column) for column in zip(*columns, strict=True))

    def flops_per_step(self, step: int = 0) -> float:
        """Returns the FLOPs of one optimizer step: each prompt once, each of its answers."""
        data, model = self.config.data, self.config.model
        prompts, reads = data.input_length, data.target_length + self.reads_end
        head = 6.0 * model.embed_dim * model.vocab_size
        logits = 0.0 if self.reads_end else head * reads
        if model.architecture == "prefix_lm":
            row = flops_per_example(model, prompts, reads) - head * (prompts + reads)
            return data.batch_size * self.columns * (row + logits)
        encoder = flops_per_example(model, prompts, 0)
        answer = flops_per_example(model, prompts, reads) - encoder - head * reads
        return data.batch_size * (encoder + self.columns * (answer + logits))

    def facts(self) -> dict[str, Any]:
        """Returns derived numbers, printed once at the start."""
        data, loader = self.config.data, self.loader
        left_out = ", ".join(f"{n} {why}" for why, n in sorted(loader.dropped.items())) or "none"
        return {
            "parameters": self.model.num_params,
            "preferences": f"{len(loader.kept):,} prompts of up to {loader.answers} answers; "
            f"left out: {left_out}",
            "batch": f"{data.batch_size} prompts x ({data.input_length} + {self.columns} x "
            f"{data.target_length}) tokens, {self.config.microbatches} microbatch(es)",
            "FLOPs per step": quantity(self.flops_per_step()),
            "steps": self.config.loop.train_steps,
            "devices": _supervised.described(self.mesh),
        }

    def predicted(self, state: Any) -> memory.Memory:
        """As a language model with a row per answer; more than is needed for shared prompts."""
        model, data = self.language_model, self.config.data
        state = memory.abstract_state(
            model, self.config.optimizer, self.config.ema_decay is not None
        )
        return memory.predict(
            model,
            state,
            self.mesh,
            batch_size=data.batch_size * self.columns,
            lengths=(data.input_length, data.target_length + self.reads_end),
            platform=target_platform(),
            strategy=self.config.sharding,
            microbatches=self.config.microbatches,
        )[0]

    def sections(self, folder: pathlib.Path) -> list[report.Section]:
        """What the report shows beyond data, curves and figures."""
        return gap_sections(folder)

    def report(self, title: str, step: int) -> None:
        """Writes report.md with the accuracy by gap."""
        folder = pathlib.Path(self.config.model_dir)
        rows = [
            {"source": str(cache.path), "prompts": len(cache.features["ranks"].lengths)}
            for cache in self.loader.caches
        ]
        report.write_report(
            folder,
            title=title,
            config_text=(folder / configs.GIN_NAME).read_text(encoding="utf-8"),
            data_table=rows,
            facts=self.facts(),
            sections=self.sections(folder),
        )

    def rendered(self, count: int) -> list[str]:
        """Returns the first prompts of the first batch, their answers with ranks."""
        batch, decode = self.loader.batch(0), self.vocabulary.decode
        texts = []
        for p in range(min(count, len(batch["prompts"]))):
            lines = [f"prompt: {decode(batch['prompts'][p][: batch['prompt_lengths'][p] - 1])}"]
            for k in np.flatnonzero(batch["answer_lengths"][p, : self.loader.answers]):
                tokens = batch["answers"][p, k][: batch["answer_lengths"][p, k] - 1]
                lines.append(f"  rank {batch['ranks'][p, k]}: {decode(tokens)}")
            texts.append("\n".join(lines))
        return texts


def pair_figures(pairs: preferences.Pairs) -> dict[str, float]:
    """Returns how well the gaps of held-out pairs agree with people, by name."""
    count, right = len(pairs.gap), preferences.accuracy(pairs.gap)
    low, high = preferences.wilson(right * count, count)
    return {
        "eval/accuracy": right,
        "eval/accuracy_low": low,
        "eval/accuracy_high": high,
        "eval/pairs": float(count),
        "eval/calibration_error": preferences.calibration_error(pairs.gap),
        "eval/length_accuracy": preferences.length_accuracy(pairs.length_gap),
    }


def write_gaps(model_dir: str, step: int, gaps: Sequence[Mapping[str, Any]]) -> None:
    """Replaces pairs.json, the table of accuracy by gap of the newest evaluation."""
    text = json.dumps({"step": step, "by_gap": list(gaps)}, indent=1) + "\n"
    _run_folder.write_whole(pathlib.Path(model_dir) / PAIRS_FILE, text)


def gap_sections(folder: pathlib.Path) -> list[report.Section]:
    """The table and the picture of the newest evaluation; nothing before the first."""
    path = folder / PAIRS_FILE
    if not path.exists():
        return []
    rows = json.loads(path.read_text(encoding="utf-8"))["by_gap"]
    plots.accuracy_by_gap(folder / plots.PLOTS / PLOT, rows)
    text = (
        f"![accuracy by gap]({plots.PLOTS}/{PLOT})\n\nHeld-out pairs by the distance of their two "
        "scores, equally many in each row; low and high bound the 95% interval of Wilson."
    )
    shown = [
        {name: round(v, 4) if isinstance(v, float) else v for name, v in row.items()}
        for row in rows
    ]
    return [report.Section("Accuracy by gap of scores", text=text, table=shown)]

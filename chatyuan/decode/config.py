"""What a person sets about decoding: one frozen dataclass, checked when it is made."""

import dataclasses
import math

from chatyuan.errors import UserError, did_you_mean

METHODS = ("greedy", "sample", "beam")


def _field(default: object, help_text: str, unit: str = "") -> object:
    return dataclasses.field(default=default, metadata={"help": help_text, "unit": unit})


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """How tokens are chosen; the processors apply in the order of the fields.

    Repetition rules look at what the decoder generated (and its start token), not at the prompt, in
    both kinds of model. Results of greedy and beam decoding equal Hugging Face `generate` with the
    parameters named in the help.

    Raises:
      UserError: a value outside its range, or settings that exclude each other.
    """

    method: str = _field("greedy", "greedy, sample or beam")
    max_decode_length: int = _field(128, "longest output, the end token included", "tokens")
    min_length: int = _field(
        0, "tokens before the end token is allowed (HF min_new_tokens)", "tokens"
    )
    num_samples: int = _field(
        1, "results a prompt: draws of method sample, or the best hypotheses of method beam"
    )
    repetition_penalty: float = _field(
        1.0, "above 1 makes tokens that already occurred less likely; 1 is off"
    )
    no_repeat_ngram_size: int = _field(
        0, "no sequence of this many tokens may occur twice; 0 is off", "tokens"
    )
    suppress_pad: bool = _field(
        True, "never emit the padding token (HF allows it; suppress_tokens=[pad])"
    )
    temperature: float = _field(1.0, "method sample: divisor of the logits")
    top_k: int = _field(0, "method sample: keep this many of the likeliest tokens; 0 keeps all")
    top_p: float = _field(
        1.0, "method sample: keep the likeliest tokens that together reach this probability"
    )
    beam_size: int = _field(4, "method beam: hypotheses kept")
    length_penalty: float = _field(
        1.0, "method beam: a hypothesis scores sum of log-probabilities / length ** this"
    )
    early_stopping: bool = _field(
        False, "method beam: stop at beam_size finished hypotheses, though a longer one might win"
    )
    model_log_probs: bool = _field(
        False,
        "also return the log-probabilities of the model itself (temperature 1, nothing filtered)",
    )
    cache_dtype: str | None = _field(
        None,
        "float32 or bfloat16: how the decoder's own keys and values are kept (bfloat16 halves the "
        "memory of long answers); None = the compute dtype",
    )

    def __post_init__(self) -> None:
        """Checks every value."""
        if self.method not in METHODS:
            raise UserError(
                f"method = {self.method!r} should be one of {', '.join(METHODS)}."
                f"{did_you_mean(str(self.method), METHODS)}"
            )
        if self.cache_dtype not in (None, "float32", "bfloat16"):
            raise UserError(f"cache_dtype = {self.cache_dtype!r} should be float32 or bfloat16.")
        for name, low in (
            ("max_decode_length", 1),
            ("min_length", 0),
            ("num_samples", 1),
            ("no_repeat_ngram_size", 0),
            ("top_k", 0),
            ("beam_size", 1),
        ):
            value = getattr(self, name)
            if value < low:
                raise UserError(f"{name} = {value} should be at least {low}.")
        for name in ("repetition_penalty", "temperature"):
            value = getattr(self, name)
            if not (value > 0 and math.isfinite(value)):
                raise UserError(
                    f"{name} = {value} should be a finite number above 0; 1.0 changes nothing."
                    + (" For no randomness use method = 'greedy'." if name == "temperature" else "")
                )
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p = {self.top_p} should be above 0 and at most 1 (1 keeps all).")
        if not math.isfinite(self.length_penalty):
            raise UserError(f"length_penalty = {self.length_penalty} should be finite.")
        if self.min_length >= self.max_decode_length:
            raise UserError(
                f"min_length = {self.min_length} leaves no room for the end token within "
                f"max_decode_length = {self.max_decode_length}; raise the one or lower the other."
            )
        self._check_num_samples()

    def _check_num_samples(self) -> None:
        if self.method == "greedy" and self.num_samples != 1:
            raise UserError(
                f"num_samples = {self.num_samples} with method = 'greedy' would repeat one answer; "
                "use method = 'sample' or num_samples = 1."
            )
        if self.method == "beam" and self.num_samples > self.beam_size:
            raise UserError(
                f"num_samples = {self.num_samples} is more than beam_size = {self.beam_size}; "
                "raise beam_size."
            )

    @property
    def rows_per_prompt(self) -> int:
        """Decoder rows that one prompt needs."""
        return self.beam_size if self.method == "beam" else self.num_samples

"""The quickstart's two mixtures.

Rates are relative numbers of examples drawn, as in seqio.
"""

import seqio

from tasks import dialogues, idioms, newspaper, reviews  # noqa: F401 (registers their tasks)

# Reviews are not quite half of the tokens: they are what is asked about later.
seqio.MixtureRegistry.add(
    "zh_pretrain", [("reviews_text", 8.0), ("newspaper", 1.0), ("idioms_text", 4.0)]
)
# Most of the tokens are reviews to judge: the one task a small model can learn in minutes.
seqio.MixtureRegistry.add(
    "zh_instruct",
    [
        ("review_sentiment", 12.0),
        ("short_dialogues", 2.0),
        ("idiom_explanation", 0.5),
        ("idiom_choice", 0.5),
        ("review_continuation", 0.5),
    ],
)

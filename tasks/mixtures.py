"""The quickstart's two mixtures.

Rates are relative numbers of examples drawn, as in seqio.
"""

import seqio

from tasks import dialogues, idioms, newspaper, reviews  # noqa: F401 (registers their tasks)

# About the share of each source's tokens, reviews doubled: they are what is asked about later.
seqio.MixtureRegistry.add(
    "zh_pretrain", [("reviews_text", 4.0), ("newspaper", 1.0), ("idioms_text", 4.0)]
)
# Two thirds of the tokens are reviews to judge: the one task a small model can learn in minutes.
seqio.MixtureRegistry.add(
    "zh_instruct",
    [
        ("review_sentiment", 6.0),
        ("short_dialogues", 1.5),
        ("idiom_explanation", 0.5),
        ("idiom_choice", 0.5),
        ("review_continuation", 0.5),
    ],
)

"""The quickstart's two mixtures.

Rates are relative numbers of examples drawn, as in seqio.
"""

import seqio

from tasks import dialogues, idioms, newspaper, reviews  # noqa: F401 (registers their tasks)

# About the share of each source's tokens, reviews doubled: they are what is asked about later.
seqio.MixtureRegistry.add(
    "zh_pretrain", [("reviews_text", 4.0), ("newspaper", 1.0), ("idioms_text", 4.0)]
)
seqio.MixtureRegistry.add(
    "zh_instruct",
    [
        ("review_sentiment", 5.0),
        ("short_dialogues", 2.0),
        ("idiom_explanation", 1.0),
        ("idiom_choice", 1.0),
        ("review_continuation", 1.0),
    ],
)

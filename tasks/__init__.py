"""Corpora and instruction tasks, registered with seqio by importing this package.

Only building a cache imports it (`chatyuan.data.seqio_build`, task_modules=("tasks",)). To add your
own, write a module that registers seqio tasks and name it: --gin.build_cache.task_modules, or give
a file: MIXTURE=file:/path/to/your.jsonl needs no code.
"""

# First: it imports TensorFlow without its greetings.
from chatyuan.data import seqio_tasks  # noqa: F401
from tasks import corpora, dialogues, idioms, mixtures, newspaper, reviews

__all__ = ["corpora", "dialogues", "idioms", "mixtures", "newspaper", "reviews"]

"""One file per thing a person runs; `python run.py` lists them by their docstrings' first lines."""

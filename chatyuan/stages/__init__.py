"""One file per thing a person runs; `python run.py` lists them by the first line of their docstrings."""

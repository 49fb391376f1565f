"""From text to batches: sources, token caches, objectives, packing and the loader."""

"""Collecting preferences: people order drafted answers on a local page. No jax."""

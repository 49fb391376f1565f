"""Cleaning without jax: deduplication."""

"""Text without jax: vocabularies, tokenizer training, normalisation, dialogue templates."""

"""TS-Align in JAX: a language model aligned with preferences mined from its own answers."""

"""Measures of a model: perplexity, bits per byte, answers."""

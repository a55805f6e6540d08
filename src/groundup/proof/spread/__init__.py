"""Proofs that a model spread over ranks is the model on one: the same loss, gradients and weights, and really spread."""

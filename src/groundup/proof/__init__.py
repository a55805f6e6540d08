"""Proofs that a user runs on their own machine: what a run promises, broken on purpose and compared bit by bit."""

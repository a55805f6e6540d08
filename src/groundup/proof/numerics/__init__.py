"""Proofs on the user's own model shape: what should change nothing but the cost changes nothing."""

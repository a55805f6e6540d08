"""Low-rank adapters on a model."""

"""The training loop, its engine, its state and its guard."""

"""What a run will need and what it is worth, told before it."""

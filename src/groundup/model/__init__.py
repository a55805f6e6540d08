"""The model's maths, and nothing else."""

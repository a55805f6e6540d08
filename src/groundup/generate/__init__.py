"""From a model to text: sampling and cached generation."""

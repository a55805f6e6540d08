"""Training on several ranks: their world, what they check of each other, and who starts them."""

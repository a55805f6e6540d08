"""What every room stands on: errors, recipe files, artifacts, seeds, the terminal."""

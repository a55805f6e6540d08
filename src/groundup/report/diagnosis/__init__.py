"""Diagnosis in words: what a run's files show, why, what to do next, and how sure that is."""

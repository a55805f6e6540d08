"""What a diagnosis says."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    """One symptom of a run."""

    seen: str
    """What the run's files show, in a sentence."""
    why: str
    """The figures it follows from."""
    next: str
    """What to do about it."""
    sureness: float
    """Between 0 and 1; what is most sure is said first."""

    @property
    def certainty(self) -> str:
        """How sure it is, in a word."""
        return "certain" if self.sureness >= 0.9 else "likely" if self.sureness >= 0.65 else "possible"

"""What a rule says about a run. The rules themselves stand in `findings.py`."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Finding:
    rule: str
    """Name of the function that found it."""
    badness: float
    """From 0 to 1, the worst come first: 1 of a run that cannot learn, 0.5 of one that learns less than it could,
    0.2 of one that is slower than it could be."""
    figure: str
    """What was seen, with its numbers: a sentence."""
    meaning: str
    """What that usually means: a sentence."""
    advice: str
    """What to change, settings named as the recipe names them: a sentence."""
    steps: tuple[int, int] | None = None
    """The first and last step that show it, if not the whole run."""

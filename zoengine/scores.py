"""How people read a score."""

# Metrics between 0 and 1, shown in percent.
FRACTIONS = ("accuracy", "token_accuracy", "f1", "exact_match")


def score(metric: str, value: float) -> str:
    """A metric's value as text: ``81.3%``, or four digits of one that is no fraction."""
    return f"{value:.1%}" if metric in FRACTIONS else f"{value:.4g}"

"""Long plain texts that are there without a download."""

from pathlib import Path
from pydoc_data.topics import topics

_ALICE = Path(__file__).parents[1] / "examples" / "data" / "alice.txt"


def load(name: str) -> str:
    """A text by its name, one of `TEXTS`."""
    if name == "alice":
        return _ALICE.read_text(encoding="utf-8")
    return "\n".join(topics[topic] for topic in sorted(topics))


TEXTS = {
    "alice": "Alice's Adventures in Wonderland, `examples/data/alice.txt`",
    "python": "Python's language reference, `pydoc_data.topics` of its standard library",
}
"""What each is, in words."""

"""The table in docs/families.md, written from what the family tests measured.

``make families`` runs the tests, each of which leaves a row, and puts the rows into the page.
"""

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

from vllm import LLM
from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention import Attention

from vllm_lminf.cli.encoding import describe

_ROOT = Path(__file__).parents[1]
PAGE = _ROOT / "docs" / "families.md"
MEASURED = _ROOT / "build" / "families.json"

_BEGIN = "<!-- families: written by `make families` -->"
_END = "<!-- families end -->"
_HEAD = ("family", "model type", "encoding", "heads", "off by at most", "status")

SERVED = "served"
REFUSED = "refused"


@dataclass(frozen=True)
class Row:
    """One family, as it was tested.

    Attributes:
        family: its name, the key of the table.
        model_type: what its configuration calls it.
        encoding: where its attention takes positions from, and what else it does.
        heads: query heads, key heads and head size of the tested model.
        difference: the largest difference of a log-probability from the oracle's.
        status: served, refused, or what else keeps it from running.
    """

    family: str
    model_type: str
    encoding: str
    heads: str = ""
    difference: str = ""
    status: str = SERVED

    @classmethod
    def of_engine(cls, family: str, llm: LLM, difference: float) -> "Row":
        """A family that an engine serves."""
        layers = _layers(llm)
        return cls(
            family,
            llm.llm_engine.vllm_config.model_config.hf_text_config.model_type,
            _encoding(llm),
            ", ".join(
                dict.fromkeys(f"{a.num_heads}/{a.num_kv_heads} × {a.head_size}" for a in layers)
            ),
            f"{difference:.0e}",
        )

    def without_difference(self) -> tuple[str, ...]:
        """What has to be the same on every machine."""
        return tuple(
            value for name, value in zip(_HEAD, astuple(self), strict=True) if name != _HEAD[4]
        )


def _layers(llm: LLM) -> list[Attention]:
    return list(get_layers_from_vllm_config(llm.llm_engine.vllm_config, Attention).values())


def _encoding(llm: LLM) -> str:
    layers = _layers(llm)
    rotary = layers[0].impl.rotary
    return describe(
        llm.llm_engine.vllm_config.model_config.hf_text_config,
        layers,
        None if rotary is None else rotary.spec.rotary_dim,
        rotary is None or rotary.spec.is_neox_style,
    )


def save(rows: Iterable[Row]) -> None:
    """Leaves the rows for `write_page`."""
    MEASURED.parent.mkdir(exist_ok=True)
    MEASURED.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")


def read_page() -> list[Row]:
    """The rows that the page has now."""
    _, table, _ = _split(PAGE.read_text())
    cells = [line.strip("|").split("|") for line in table.strip().splitlines()[2:]]
    return [Row(*(cell.strip() for cell in line)) for line in cells]


def write_page() -> None:
    """Puts the rows that were saved last into the page."""
    rows = [Row(**row) for row in json.loads(MEASURED.read_text())]
    lines = [_HEAD, ("---",) * len(_HEAD), *(astuple(row) for row in rows)]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    before, _, after = _split(PAGE.read_text())
    PAGE.write_text(f"{before}\n\n{table}\n\n{after}")


def _split(text: str) -> tuple[str, str, str]:
    """A text up to the table, the table, and what follows it; the marks go with the outer two."""
    before, found, rest = text.partition(_BEGIN)
    table, found_end, after = rest.partition(_END)
    if not found or not found_end:
        sys.exit(f"{PAGE} has lost the marks between which the table of families stands")
    return before + _BEGIN, table, _END + after


if __name__ == "__main__":
    if not MEASURED.is_file():
        sys.exit(f"{MEASURED} isn't there: not every family test left its row; run `make families`")
    write_page()

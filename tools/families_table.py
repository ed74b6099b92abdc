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

_ROOT = Path(__file__).parents[1]
PAGE = _ROOT / "docs" / "families.md"
MEASURED = _ROOT / "build" / "families.json"

_BEGIN = "<!-- families: written by `make families` -->"
_END = "<!-- families end -->"
_HEAD = ("family", "model type", "encoding", "heads", "off by at most", "status")

SERVED = "served"
REFUSED = "refused"

_ROPE_NAMES = {
    "default": "RoPE",
    "linear": "RoPE, linear scaling",
    "llama3": "RoPE, llama3 scaling",
    "yarn": "YaRN",
    "dynamic": "RoPE, dynamic NTK",
    "longrope": "LongRoPE",
}


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
    impls = [layer.impl for layer in layers]
    if impls[0].rules.alibi_slopes is not None:
        parts = ["ALiBi"]
    else:
        config = llm.llm_engine.vllm_config.model_config.hf_text_config
        given = getattr(config, "rope_parameters", None) or {}
        per_type = [p for p in given.values() if isinstance(p, dict)] or [given]
        parts = list(dict.fromkeys(_ROPE_NAMES[p.get("rope_type", "default")] for p in per_type))
        spec = impls[0].rotary.spec
        if spec.rotary_dim < layers[0].head_size:
            parts.append(f"on {spec.rotary_dim} of {layers[0].head_size} dimensions")
        if not spec.is_neox_style:
            parts.append("interleaved pairs")
    if windowed := sum(layer.sliding_window is not None for layer in layers):
        parts.append(f"own window kept in {windowed} of {len(layers)} layers")
    if impls[0].rules.softcap is not None:
        parts.append("soft-capping")
    if impls[0].rules.sinks is not None:
        parts.append("learned sinks")
    return "; ".join(parts)


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

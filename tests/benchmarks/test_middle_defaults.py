"""The study of the middle's defaults: what it varies, and its page."""

import json
from dataclasses import asdict

from benchmarks.middle_defaults import CENTRE, NOTHING, PAGE, settings, tables
from vllm_lminf.middle import Middle
from vllm_lminf.plugin.config import Settings


def test_one_setting_is_varied_at_a_time() -> None:
    nothing, *others = settings()
    assert nothing == NOTHING
    assert len(set(others)) == len(others)
    centre = asdict(Middle(**CENTRE))
    assert centre in map(asdict, others)
    for each in others:
        differing = {name for name, value in asdict(each).items() if value != centre[name]}
        assert len(differing) <= 1 or (each.block_size > 1 and differing <= {"block_size", "top_k"})


def test_its_centre_is_what_is_served_by_default() -> None:
    """The distance is half of what the studied model was trained on."""
    served = Settings()
    assert (served.middle_rows, served.middle_from_layer) == (CENTRE["rows"], CENTRE["from_layer"])
    assert served.middle_distance is None
    assert CENTRE["distance"] == 8192 // 2


def test_the_page_shows_the_results() -> None:
    data = json.loads((PAGE.with_suffix("") / "results.json").read_text(encoding="utf-8"))
    page = PAGE.read_text(encoding="utf-8")
    for title, cells in tables(data):
        assert f"**{title}**\n\n{cells}\n" in page

"""audit.html: one file with everything in it, which opens from disk and asks no network for anything."""

import html
import importlib.resources
import json
import re
from collections.abc import Mapping
from typing import Any

_LISTED = 5000  # lost rows and duplicates on the page; audit.json has all


def page_of(told: Mapping[str, Any], samples: Mapping[str, Any], *, title: str) -> str:
    """The page of an audit: `told` is audit.json's content, `samples` the examples that are shown."""
    data = {"title": title, "audit": _shortened(told), **samples}
    assets = importlib.resources.files("jaxtune") / "assets" / "audit"
    page = (assets / "page.html").read_text(encoding="utf-8")
    parts = {
        "@TITLE@": html.escape(title),
        "@STYLE@": (assets / "page.css").read_text(encoding="utf-8"),
        "@DATA@": _embedded(data),
        "@SCRIPT@": (assets / "page.js").read_text(encoding="utf-8"),
    }
    pieces = re.split(r"(@[A-Z]+@)", page)  # once, for the texts put in may say anything
    return "".join(parts.get(piece, piece) for piece in pieces)


def _embedded(data: Mapping[str, Any]) -> str:
    """JSON that no text inside can end early: in a script element only `<` could."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")


def _shortened(told: Mapping[str, Any]) -> dict[str, Any]:
    """The facts with their longest lists cut; flags are told with the examples."""
    out = {key: value for key, value in told.items() if key != "flagged_rows"}
    out["lost_rows_in_all"] = len(out["lost_rows"])
    out["lost_rows"] = out["lost_rows"][:_LISTED]
    out["duplicates"] = {
        kind: copies and {**copies, "rows": copies["rows"][:_LISTED]} for kind, copies in out["duplicates"].items()
    }
    return out

"""`docs/fields.md`: every documented field and route of OpenAI, vLLM and llama.cpp, and what this server does with it.

python -m tests.http.field_table            checks that the file is as the code says
python -m tests.http.field_table --write    writes it
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from max_ray.serve.api.neutral_fields import ROUTES_INSTEAD
from max_ray.serve.api.route_table import ROUTES
from tests.http.field_facts import EFFECTS, LABELS, MODELS, REASONS, ROUTE_REASONS, ROUTES_OF, SERVERS
from tests.source_tree import ROOT

FILE = ROOT / "docs" / "fields.md"
HONOURED, NEUTRAL, REFUSED, LABEL = "honoured", "neutral", "refused", "label"
_HEAD = """# Fields and routes

What this server does with every documented field and route of the OpenAI API, of vLLM and of llama.cpp's server. The
tables are made from the code by `python -m tests.http.field_table --write`, and a test compares them.

- **honoured**: the field has its effect, and the named test (below `tests/`) shows it.
- **label**: checked, kept with the request, and without effect on the answer.
- **neutral**: passes with the values that ask for nothing; another value is a 400 that names the field.
- **refused**: a 400 that names the field, except as null.
"""


@dataclass(frozen=True)
class Line:
    """A field of a route: its name, the servers that document it, its status, and what is to be said of it."""

    name: str
    servers: str
    status: str
    words: str


def fields_of(path: str) -> list[Line]:
    """All fields of a route: those that other servers document, and those that this one knows."""
    model = MODELS[path]
    own = {field.alias or name for name, field in model.model_fields.items()}
    names = dict.fromkeys(name for server in SERVERS.values() for name in server[path])
    names |= dict.fromkeys([*sorted(own), *model.ALIASES, *model.NEUTRAL])
    return [_line(path, name, name in own or name in model.ALIASES) for name in names]


def _line(path: str, name: str, is_honoured: bool) -> Line:
    model = MODELS[path]
    servers = ", ".join(server for server, routes in SERVERS.items() if name in routes[path]) or "others"
    if name in LABELS and is_honoured:
        return Line(name, servers, LABEL, "at most 512 characters a text")
    if is_honoured:
        effect = EFFECTS[path].get(name)
        assert effect is not None, (
            f"{path}: no test shows the effect of {name!r}; name one in tests/http/field_facts.py"
        )
        return Line(name, servers, HONOURED, f"`{effect.test}`")
    neutral = model.NEUTRAL.get(name)
    why = (neutral.instead if neutral else "") or REASONS.get(name, "") or model.INSTEAD.get(name, "")
    if neutral is not None and neutral.values:
        return Line(name, servers, NEUTRAL, f"only as {neutral.values}. {why}".strip())
    return Line(name, servers, REFUSED, why)


def routes() -> list[Line]:
    """All documented routes, and this server's others."""
    own = {f"{method} {route.label}": route.summary for route in ROUTES for method in route.methods if method != "HEAD"}
    names = dict.fromkeys(name for of_server in ROUTES_OF.values() for name in of_server) | dict.fromkeys(own)
    return [_route(name, own.get(name)) for name in names]


def _route(name: str, summary: str | None) -> Line:
    servers = ", ".join(server for server, names in ROUTES_OF.items() if name in names) or "others"
    if summary is not None:
        return Line(name, servers, HONOURED, summary)
    path = name.split()[1]
    reason = next((why for part, why in ROUTE_REASONS.items() if part in name), "")
    return Line(name, servers, REFUSED, ROUTES_INSTEAD.get(path, reason))


def document() -> str:
    """The page."""
    parts = [_HEAD, "## Routes\n", _table("route", routes(), "what it does, or what to use instead")]
    for path in MODELS:
        parts += [f"## `{path}`\n", _table("field", fields_of(path), "test, values that pass, or why not")]
    return "\n".join(parts)


def _table(first: str, lines: list[Line], last: str) -> str:
    rows = [f"| `{line.name}` | {line.servers} | {line.status} | {_cell(line.words)} |" for line in lines]
    return "\n".join([f"| {first} | documented by | status | {last} |", "|---|---|---|---|", *rows, ""])


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> None:
    """Checks or writes the page."""
    if "--write" in sys.argv[1:]:
        FILE.write_text(document(), encoding="utf-8")
    elif FILE.read_text(encoding="utf-8") != document():
        sys.exit("docs/fields.md is not what the code says: run python -m tests.http.field_table --write")


if __name__ == "__main__":
    main()

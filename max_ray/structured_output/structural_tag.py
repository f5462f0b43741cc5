"""Structural tags: free text in which tags with a JSON body may stand, as vLLM and SGLang name them.

    {"type": "structural_tag", "triggers": ["<function="],
     "structures": [{"begin": "<function=add>", "schema": {...}, "end": "</function>"}]}

The text is free until a trigger is complete. From there on it must go on as one of the structures that begin with the
trigger, up to the structure's end; then it is free again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from max_ray.errors import InputError

MAX_STRUCTURES = 128


def lark_of_tags(tags: Any, json_of: Callable[[Any, str], str]) -> str:
    """The grammar of structural tags, in Lark.

    Args:
        tags: The parsed JSON.
        json_of: Gives the Lark of a JSON schema; its second argument says where the schema stands.

    Raises:
        InputError: Where the shape is wrong, or a structure begins with no trigger.
    """
    structures, triggers = _shape(tags)
    names = " | ".join(f"tag_{number}" for number in range(len(structures)))
    lines = [f"start: ({names})* rest", "rest: TEXT", r"TEXT: /(.|\n)*/"]
    for number, structure in enumerate(structures):
        begin = structure["begin"]
        trigger = next((trigger for trigger in triggers if begin.startswith(trigger)), None)
        if trigger is None:
            raise InputError(f"structures[{number}].begin starts with none of the triggers.")
        body = json_of(structure["schema"], f"structures[{number}].schema")
        parts = [_literal(begin[len(trigger) :]), body, _literal(structure["end"])]
        lines.append(f"tag_{number}_head[lazy]: TEXT {_literal(trigger)}")
        lines.append(f"tag_{number}: tag_{number}_head {' '.join(part for part in parts if part)}")
    return "\n".join(lines)


def _shape(tags: Any) -> tuple[list[dict[str, Any]], list[str]]:
    """(structures, triggers) of well-formed tags."""
    known = {"type", "structures", "triggers"}
    if not isinstance(tags, dict) or not tags.keys() <= known or tags.get("type", "structural_tag") != "structural_tag":
        raise InputError(f"A structural tag has the fields {', '.join(sorted(known))}; no other shape is supported.")
    structures, triggers = tags.get("structures"), tags.get("triggers")
    if not isinstance(structures, list) or not 0 < len(structures) <= MAX_STRUCTURES:
        raise InputError(f"structures must be a list of 1 to {MAX_STRUCTURES} objects.")
    if not isinstance(triggers, list) or not triggers or not all(isinstance(t, str) and t for t in triggers):
        raise InputError("triggers must be a list of texts that are not empty.")
    for number, structure in enumerate(structures):
        if not isinstance(structure, dict) or structure.keys() != {"begin", "schema", "end"}:
            raise InputError(f"structures[{number}] must have the fields begin, schema and end.")
        if not isinstance(structure["begin"], str) or not isinstance(structure["end"], str):
            raise InputError(f"structures[{number}].begin and .end must be texts.")
    return structures, triggers


def _literal(text: str) -> str:
    return json.dumps(text) if text else ""

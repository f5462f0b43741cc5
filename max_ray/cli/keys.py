"""`max-ray keys new NAME`: makes an API key, prints it once, and prints the entry for the file of keys."""

from __future__ import annotations

import argparse
from typing import Any

import yaml

from max_ray.errors import ConfigError
from max_ray.serve.api.access.key_file import KeyEntry, key_hash, new_key

_LIMITS = ("max_concurrent_requests", "requests_per_minute", "tokens_per_minute")


def add_key_commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    """The commands below `max-ray keys`, by name."""
    commands = parser.add_subparsers(dest="keys", required=True, metavar="COMMAND", parser_class=type(parser))
    new = commands.add_parser("new", help="make a key", allow_abbrev=False)
    new.add_argument("name", help="Name of the key: letters, digits and _.@- (it is no secret).")
    new.add_argument("--models", action="append", metavar="NAME", help="A model that the key may use. Default: all.")
    new.add_argument("--weight", type=float, metavar="NUMBER", help="Share of the server. Default: 1.")
    for name in _LIMITS:
        text = f"Limit of {name.replace('_', ' ').removeprefix('max ')} in each replica. Default: none."
        new.add_argument("--" + name.replace("_", "-"), type=int, metavar="NUMBER", help=text)
    new.add_argument("--admin", action="store_true", default=None, help="May read what belongs to other keys.")
    return {"new": new}


def run_keys(options: dict[str, Any]) -> None:
    """Makes a key. Raises ConfigError for a limit or a name that cannot be."""
    assert options.pop("keys") == "new"
    key = new_key()
    fields = {name: value for name, value in options.items() if value is not None}
    entry = {"name": fields.pop("name"), "sha256": key_hash(key.encode()), **fields}
    try:
        KeyEntry.model_validate(entry)
    except ValueError as error:
        raise ConfigError(f"This key cannot be made: {error}") from None
    print(f"The key, which is shown only now:\n\n{key}\n\nIts entry below `keys:` in the file of --api-keys-file:\n")
    print(yaml.safe_dump([entry], sort_keys=False), end="")

"""The file of API keys: who has one, with its SHA-256 and its limits. No key itself is in it.

    keys:
      - name: alice
        sha256: 5e88...
        weight: 2
        requests_per_minute: 600

YAML or JSON. `max-ray keys new NAME` makes a key and prints its entry.
"""

from __future__ import annotations

import hashlib
import secrets
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from max_ray.errors import ConfigError
from max_ray.serve.api.access.rate_limits import KeyLimits

MAX_FILE_BYTES = 8 * 2**20
_Count = Annotated[int, Field(strict=True, ge=1)]


class KeyEntry(BaseModel):
    """One key.

    Attributes:
        name: Of the key, in errors, logs and metrics; no secret.
        sha256: Of the key, in hexadecimal digits.
        models: Names of models that it may use; None: all.
        weight: Its share of the server, in proportion to other keys' weights.
        max_concurrent_requests: HTTP requests at a time, in each replica.
        requests_per_minute: HTTP requests, in each replica.
        tokens_per_minute: Tokens of prompts and answers, in each replica.
        admin: Whether it may read what belongs to other keys.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(pattern=r"^[\w.@-]{1,64}$")
    sha256: str = Field(pattern="^[0-9a-fA-F]{64}$")
    models: tuple[str, ...] | None = None
    weight: float = Field(default=1.0, gt=0, le=1e6)
    max_concurrent_requests: _Count | None = None
    requests_per_minute: _Count | None = None
    tokens_per_minute: _Count | None = None
    admin: bool = Field(default=False, strict=True)

    @property
    def limits(self) -> KeyLimits:
        """What of it is counted."""
        return KeyLimits(self.max_concurrent_requests, self.requests_per_minute, self.tokens_per_minute)


class _KeyFile(BaseModel):
    model_config = ConfigDict(extra="forbid")

    keys: tuple[KeyEntry, ...]


def read_key_file(path: Path) -> tuple[KeyEntry, ...]:
    """The entries of a file. Raises ConfigError; no text of the file is in it."""
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        content = yaml.load(data[:MAX_FILE_BYTES], getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except OSError as error:
        raise ConfigError(f"The file of API keys {path} cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError):
        raise ConfigError(f"The file of API keys {path} is neither YAML nor JSON.") from None
    if len(data) > MAX_FILE_BYTES:
        raise ConfigError(f"The file of API keys {path} has more than {MAX_FILE_BYTES} bytes.")
    return _checked(path, content)


def _checked(path: Path, content: Any) -> tuple[KeyEntry, ...]:
    try:
        entries = _KeyFile.model_validate(content).keys
    except ValidationError as error:
        details = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, details["loc"])) or "the file"
        raise ConfigError(f"The file of API keys {path} is wrong at {where}: {details['msg']}.") from None
    if not entries:
        raise ConfigError(f"The file of API keys {path} has no key.")
    for attribute in ("name", "sha256"):
        values = [getattr(entry, attribute).lower() for entry in entries]
        if len(set(values)) != len(values):
            raise ConfigError(f"The file of API keys {path} has two keys with the same {attribute}.")
    return entries


def new_key() -> str:
    """A key of 256 random bits."""
    return f"mr-{secrets.token_urlsafe(32)}"


def key_hash(key: bytes) -> str:
    """What the file has of a key."""
    return hashlib.sha256(key).hexdigest()

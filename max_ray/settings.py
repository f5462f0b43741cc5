"""The process environment: only this module reads `os.environ`, and `serve/haproxy_launcher.py`, which runs
without the package.

| variable             | meaning                                                                  |
|----------------------|--------------------------------------------------------------------------|
| MAX_RAY_<SETTING>    | any setting of PipelineConfig or ServeConfig, e.g. MAX_RAY_MAX_LENGTH    |
| MAX_RAY_CONFIG       | path of a YAML file with settings                                        |
| MAX_RAY_CACHE_DIR    | where custom architectures are unpacked (default: ~/.cache/max_ray)      |
| MAX_RAY_NATIVE       | 0: no C++ kernels on the CPU, even where a compiler is (default: 1)      |
| MAX_RAY_INT8         | 0: inputs of quantized layers keep their type where bytes are multiplied  |
| MAX_RAY_LOG_LEVEL    | DEBUG, INFO, WARNING or ERROR (default: INFO); `serve` has no log file then |

Benchmarks also read TRITON_INTERPRET (1: a CPU runs the Triton kernels in their interpreter), CASE_LOG and CASE_STEP
(see `benchmark/case_log.py`).

An empty variable counts as not set. Of Ray's own variables RAY_USE_TLS and RAY_TLS_* are read, and no others.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from max_ray.errors import ConfigError

PREFIX = "MAX_RAY_"
CONFIG_FILE = "MAX_RAY_CONFIG"
CACHE_DIR = "MAX_RAY_CACHE_DIR"
LOG_LEVEL = "MAX_RAY_LOG_LEVEL"
API_KEYS = "MAX_RAY_API_KEYS"

NATIVE = "MAX_RAY_NATIVE"
INT8 = "MAX_RAY_INT8"

LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")

# Variables with our prefix that are not settings of a config model.
OTHER_VARIABLES = frozenset({CONFIG_FILE, CACHE_DIR, LOG_LEVEL, NATIVE, INT8})


def variable(name: str) -> str | None:
    """One environment variable; None when it is unset or empty."""
    return os.environ.get(name) or None


def environment() -> dict[str, str]:
    """All non-empty variables that start with MAX_RAY_."""
    return our_variables(os.environ)


def our_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """The non-empty MAX_RAY_ variables of `environ`."""
    return {name: value for name, value in environ.items() if name.startswith(PREFIX) and value}


def log_level() -> str:
    """Raises ConfigError for a level that does not exist."""
    level = (variable(LOG_LEVEL) or "INFO").upper()
    if level not in LOG_LEVELS:
        raise ConfigError(f"{LOG_LEVEL} must be one of {', '.join(LOG_LEVELS)}, not {variable(LOG_LEVEL)!r}.")
    return level


def ray_tls_paths() -> tuple[str, str, str] | None:
    """(certificate, key, CA certificate) of Ray's own TLS; None where RAY_USE_TLS is off.

    Raises ConfigError when TLS is on and a file is not named.
    """
    if (variable("RAY_USE_TLS") or "").lower() not in ("1", "true"):
        return None
    names = ("RAY_TLS_SERVER_CERT", "RAY_TLS_SERVER_KEY", "RAY_TLS_CA_CERT")
    paths = [variable(name) or "" for name in names]
    if not all(paths):
        raise ConfigError(f"RAY_USE_TLS is on, but {names[paths.index('')]} names no file.")
    return paths[0], paths[1], paths[2]


def native_kernels() -> bool:
    """Whether the CPU may run compiled kernels. Raises ConfigError for a value other than 0 and 1."""
    return _is_on(NATIVE)


def int8_inputs() -> bool:
    """Whether inputs of quantized layers may be rounded to 8 bits. Raises ConfigError as `native_kernels` does."""
    return _is_on(INT8)


def _is_on(name: str) -> bool:
    value = variable(name) or "1"
    if value not in ("0", "1"):
        raise ConfigError(f"{name} must be 0 or 1, not {value!r}.")
    return value == "1"


def cache_dir() -> Path:
    """The per-user folder for unpacked files; not created here."""
    given = variable(CACHE_DIR)
    if given is not None:
        return Path(given).expanduser().absolute()
    base = variable("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "max_ray"

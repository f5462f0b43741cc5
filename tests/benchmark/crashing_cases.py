"""A step of a visit whose cases fail in every way: python -m tests.benchmark.crashing_cases"""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from max_ray.benchmark.case_log import CaseLog


def fail() -> dict[str, Any]:
    raise ValueError("this case is wrong")


def die() -> dict[str, Any]:
    os._exit(7)


def lose_device() -> None:
    raise RuntimeError("an illegal memory access was encountered")


def main() -> int:
    log = CaseLog.from_environment("crashing")
    log.run("good", lambda: {"seconds": 1.0})
    log.run("raises", fail)
    log.run("disagrees", lambda: {"agrees": False})
    log.run("dies", die)
    lost = CaseLog.from_environment("crashing", lose_device)
    lost.run("loses the device", fail)
    if "--hang" in sys.argv:
        lost.run("hangs", lambda: time.sleep(60) or {})
    lost.run("last", lambda: {"seconds": 2.0})
    lost.finish()
    return 1


if __name__ == "__main__":
    sys.exit(main())

"""At which priority the processes that answer requests run.

Ray lowers that of its workers (niceness 15), for batch jobs on shared machines. A server does badly with it: beside a
single busy process of ordinary priority, such a worker gets a thirtieth of that processor, and the others of its
parallel loops wait for it. Ray's worker processes read this variable when they start: our actors carry it wherever they
are started, and the job does, for Serve's own, where we start Serve.
"""

from __future__ import annotations

ORDINARY_PRIORITY = {"RAY_worker_niceness": "0"}
"""Environment variables, for a runtime environment of Ray."""

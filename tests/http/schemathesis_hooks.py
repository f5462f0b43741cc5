"""Hooks of schemathesis for `test_schemathesis`: which refusals of a body that its schema allows are right.

A JSON schema says what each field may be. It does not say that two fields contradict each other, that a text is too
long for the model, or that a regular expression is none. Such a body is a 400 too, and its message tells the rule. A
message about a field that is unknown, missing or of a wrong kind is no rule: there the schema is wrong.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import schemathesis

RULES_FILE = "SCHEMATHESIS_RULES_FILE"
"""The environment's name of a file that the messages of the rules are written to."""
_OF_ONE_FIELD = re.compile(
    r"Unknown field|The field '[^']*' is (required\.|not valid|not supported)|is known from other servers"
)


def is_rule(status: int, message: str) -> bool:
    """Whether a refusal is about more than what a field may be."""
    return status == 400 and not _OF_ONE_FIELD.search(message)


@schemathesis.hook
def filter_failure(context: Any, failure: Any, case: Any, response: Any) -> bool:
    """Whether a failure counts."""
    if type(failure).__name__ != "RejectedPositiveData":
        return True
    if case.method == "HEAD":  # it has no body to say why; GET is refused for the same reasons
        return False
    error = response.json().get("error", "")
    message = error if isinstance(error, str) else error["message"]
    if not is_rule(response.status_code, message):
        return True
    with Path(os.environ[RULES_FILE]).open("a", encoding="utf-8") as rules:
        rules.write(f"{case.operation.label}: {message}\n")
    return False

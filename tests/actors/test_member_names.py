"""Names of members are told from those of other actors in the namespace."""

from __future__ import annotations

import pytest

from max_ray.actors.messages import member_place
from max_ray.serve import batch_store, response_store


@pytest.mark.parametrize("app", ["app", "my:app", "a b", "x:worker_1"])
def test_stores_of_an_application_are_no_members(app: str) -> None:
    """A registry that reads its groups back looks at every actor of the namespace."""
    assert member_place(f"{app}-0-abc:worker_12:3") == (f"{app}-0-abc", 12, 3)
    assert member_place(f"{app}-0-abc:kv_manager:1") == (f"{app}-0-abc", None, 1)
    for name in (batch_store.actor_name(app), response_store.actor_name(app), "x", "a:worker_x:1", "a:worker_1:b"):
        assert member_place(name) is None

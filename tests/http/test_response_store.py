"""The store of responses: what it gives back, and its bounds in number, bytes and age."""

from __future__ import annotations

import random

from max_ray.serve.api.responses.store import LocalResponseStore


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


async def add(store: LocalResponseStore, name: str, parent: str | None = None, size: int = 10) -> None:
    await store.put(name, b"r" * size, b"i" * size, b"o" * size, parent, True)


async def test_what_was_put_is_found() -> None:
    store = LocalResponseStore()
    await store.put("a", b"ra", b"ia", b"oa", None, True)
    await store.put("b", b"rb", b"ib", b"ob", "a", True)
    found = await store.find("b")
    assert found is not None
    assert (found.response, found.items, found.is_done) == (b"rb", b"ib", True)
    assert await store.history("b") == [b"ia", b"oa", b"ib", b"ob"]
    assert await store.find("c") is None
    assert await store.history("c") is None
    assert await store.delete("a")
    assert not await store.delete("a")
    assert await store.history("b") == [b"ia", b"oa", b"ib", b"ob"]


async def test_what_is_being_made() -> None:
    clock = Clock()
    store = LocalResponseStore(clock=clock)
    await store.put("a", b"", b"", b"[]", None, False)
    await store.put("b", b"", b"", b"[]", None, False)
    clock.now = 5
    assert await store.heartbeat(["a", "b", "c"]) == ["c"]
    clock.now = 7
    found = await store.find("a")
    assert found is not None
    assert (found.is_done, found.silence_s) == (False, 2)
    assert await store.history("a") is None
    assert await store.finish("a", b"done", b"o")
    assert not await store.finish("a", b"again", b"o")
    assert not await store.finish("c", b"", b"")
    assert await store.heartbeat(["a", "b"]) == ["a"]
    assert await store.history("a") == [b"", b"o"]


async def test_the_oldest_go_first() -> None:
    store = LocalResponseStore(max_responses=3)
    for name in "abcde":
        await add(store, name)
    assert [await store.find(name) is not None for name in "abcde"] == [False, False, True, True, True]


async def test_bytes_are_bounded() -> None:
    store = LocalResponseStore(max_bytes=100)
    for name in "abcde":
        await add(store, name)
        assert store.num_bytes <= 100
    assert len(store) == 3
    await add(store, "f", size=50)
    assert (len(store), store.num_bytes) == (0, 0)


async def test_age_is_bounded() -> None:
    clock = Clock()
    store = LocalResponseStore(max_age_s=10, clock=clock)
    await add(store, "a")
    clock.now = 6
    await add(store, "b")
    clock.now = 10
    assert await store.find("a") is None
    assert await store.find("b") is not None


async def test_random_conversations_keep_the_count_of_bytes() -> None:
    rng = random.Random(1)
    store = LocalResponseStore(max_responses=20, max_bytes=3000)
    histories: dict[str, int] = {}
    for number in range(2000):
        parent = rng.choice([None, *list(histories)[-10:]])
        if parent is not None and await store.find(parent) is None:
            parent = None
        size = rng.randrange(40)
        await add(store, str(number), parent, size)
        histories[str(number)] = (histories[parent] if parent else 0) + 2 * size
        lists = await store.history(str(number))
        if lists is not None:
            assert sum(map(len, lists)) == histories[str(number)]
        if rng.random() < 0.2:
            await store.delete(str(rng.randrange(number + 1)))
        assert len(store) <= 20
        assert store.num_bytes <= 3000
    for number in range(2000):
        await store.delete(str(number))
    assert store.num_bytes == 0

"""The Grafana dashboard: every panel's query names what `/metrics` has, and finds data in a real Prometheus."""

from __future__ import annotations

import asyncio
import json
import math
import re
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from prometheus_client.parser import text_string_to_metric_families

from deployments.grafana_dashboard import SOURCES, build_dashboard
from max_ray.serve.api.metrics import TEXT_ROUTES, Metrics, MetricsSnapshot
from max_ray.serve.api.routes import build_api
from max_ray.tokenization.tokenizer import TextTokenizer
from tests.byte_tokenizer import write_byte_level
from tests.scheduler.harness import Harness, running
from tests.scheduler.test_admission import LoopEngine
from tests.serve.conftest import free_port
from tests.source_tree import ROOT

FILE = ROOT / "deployments" / "configs" / "grafana" / "max_ray.json"
FUNCTIONS = {"rate", "sum", "max", "count", "histogram_quantile", "by"}
SCRAPES_S = 12


def panels() -> list[dict[str, Any]]:
    return [panel for panel in build_dashboard()["panels"] if panel["type"] != "row"]


def queries() -> list[str]:
    return [target["expr"] for panel in panels() for target in panel["targets"]]


def filled(query: str, source: str = "max_ray") -> str:
    """A query as Grafana sends it with every variable at All."""
    text = query.replace("${source}", source).replace("$__rate_interval", "6s")
    return re.sub(r"\$(model|replica|route)", ".*", text)


class BusyEngine(LoopEngine):
    """A real loop behind the routes, whose numbers the page tells."""

    def __init__(self, tokenizer: TextTokenizer, harness: Harness) -> None:
        super().__init__(tokenizer, harness.loop)
        self.metrics = Metrics("fake", "r0", TEXT_ROUTES)

    async def metrics_snapshots(self) -> Sequence[MetricsSnapshot]:
        return [self.metrics.snapshot(self.loop.stats, {"load": 2.5, "compile": 0.5})]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> TextTokenizer:
    return TextTokenizer(write_byte_level(tmp_path_factory.mktemp("dashboard")), max_length=60)


@asynccontextmanager
async def busy_app(tokenizer: TextTokenizer) -> AsyncIterator[BusyEngine]:
    """More requests than the cache holds."""
    async with running(max_batch_size=4, max_queued=64, budget=16, num_blocks=20) as harness:
        yield BusyEngine(tokenizer, harness)


async def load(client: httpx.AsyncClient, num_requests: int = 12) -> None:
    """Some requests with a common prefix; some wait, and some are preempted."""
    body = {"prompt": [7, 8, 9, 1, 2, 3, 4, 5, 6], "max_tokens": 20, "ignore_eos": True, "seed": 1}
    replies = await asyncio.gather(*(client.post("/v1/completions", json=body) for _ in range(num_requests)))
    assert {reply.status_code for reply in replies} == {200}


def test_the_file_is_what_the_program_makes() -> None:
    assert json.loads(FILE.read_text(encoding="utf-8")) == build_dashboard(), (
        "python -m deployments.grafana_dashboard > deployments/configs/grafana/max_ray.json"
    )


def test_panels_do_not_overlap_and_have_titles_of_their_own() -> None:
    cells: dict[tuple[int, int], int] = {}
    for panel in build_dashboard()["panels"]:
        place = panel["gridPos"]
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert cells.setdefault((x, y), panel["id"]) == panel["id"]
                assert x < 24
    titles = [panel["title"] for panel in panels()]
    assert len(set(titles)) == len(titles) >= 25
    assert len({panel["id"] for panel in build_dashboard()["panels"]}) == len(build_dashboard()["panels"])


def test_variables_are_those_that_queries_use() -> None:
    names = {variable["name"] for variable in build_dashboard()["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(build_dashboard())))
    assert used - names == {"__all", "__rate_interval"}
    assert names - used == set()


async def test_every_query_names_metrics_and_labels_that_the_page_has(small: TextTokenizer) -> None:
    async with busy_app(small) as engine:
        transport = httpx.ASGITransport(build_api(engine))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
            await load(client)
            page = (await client.get("/metrics")).text
    labels: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    used: set[str] = set()
    for query in queries():
        for name, selector in re.findall(r"(max_ray_\w+)\{([^}]*)\}", filled(query)):
            used.add(name)
            assert set(re.findall(r"(\w+)=~", selector)) <= labels[name], query
            grouped = re.search(r"by \(([\w, ]+)\)", query)
            assert grouped is None or set(grouped[1].split(", ")) <= labels[name], query
        words = set(re.findall(r"[a-z_]+(?=\s*\()", query))
        assert words <= FUNCTIONS, query
        assert query.count("(") == query.count(")")
    left_out = {name.removesuffix("_bucket").removesuffix("_count").removesuffix("_sum") for name in set(labels) - used}
    shown = {name.removesuffix("_bucket").removesuffix("_sum") for name in used}
    assert left_out - shown == {"max_ray_finished_requests_total"}, "request_success_total tells the same, by reason"


@pytest.fixture
def prometheus(tmp_path: Path) -> Iterator[tuple[int, int]]:
    """(its port, the port that it scrapes once a second)."""
    if shutil.which("prometheus") is None:
        pytest.skip("needs prometheus (apt-get install prometheus)")
    port, target = free_port(), free_port()
    relabelled = [{"source_labels": ["__name__"], "target_label": "__name__", "replacement": "ray_$1", "regex": "(.+)"}]
    jobs = [
        {"job_name": "app", "static_configs": [{"targets": [f"127.0.0.1:{target}"]}]},
        {
            "job_name": "ray",
            "static_configs": [{"targets": [f"127.0.0.1:{target}"]}],
            "metric_relabel_configs": relabelled,
        },
    ]
    config = {"global": {"scrape_interval": "1s"}, "scrape_configs": jobs}
    (tmp_path / "prometheus.yml").write_text(json.dumps(config), encoding="utf-8")
    command = [
        "prometheus",
        f"--config.file={tmp_path / 'prometheus.yml'}",
        f"--storage.tsdb.path={tmp_path / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=error",
    ]
    process = subprocess.Popen(command)
    yield port, target
    process.terminate()
    process.wait(20)


async def loaded_for(url: str, seconds: float) -> None:
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        end = asyncio.get_running_loop().time() + seconds
        while asyncio.get_running_loop().time() < end:
            await load(client)
            chat = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 4}
            await client.post("/v1/chat/completions", json=chat)
            await asyncio.sleep(0.2)


@pytest.mark.slow
async def test_every_query_finds_data_in_prometheus(small: TextTokenizer, prometheus: tuple[int, int]) -> None:
    port, target = prometheus
    async with busy_app(small) as engine:
        config = uvicorn.Config(build_api(engine), port=target, log_level="warning", lifespan="off")
        server = uvicorn.Server(config)
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.02)
        await loaded_for(f"http://127.0.0.1:{target}", SCRAPES_S)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            for source in SOURCES.values():
                for query in queries():
                    reply = await client.get("/api/v1/query", params={"query": filled(query, source)})
                    found = reply.json()
                    assert found["status"] == "success", (query, found)
                    values = [float(one["value"][1]) for one in found["data"]["result"]]
                    assert any(math.isfinite(value) for value in values), (filled(query, source), found)
            for name in ("model", "replica", "route"):
                (variable,) = [one for one in build_dashboard()["templating"]["list"] if one["name"] == name]
                match = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["definition"])
                assert match is not None
                where = {"match[]": filled(match[1])}
                values = (await client.get(f"/api/v1/label/{match[2]}/values", params=where)).json()["data"]
                assert values, variable
        server.should_exit = True
        await serving

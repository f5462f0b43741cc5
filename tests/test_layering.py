"""Imports point down. The table says who may import whom; heavy libraries stay behind their fences.

An import inside a function or under TYPE_CHECKING counts as any other.
`python -m tests.test_layering` prints the table by levels.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter

import pytest

from tests.source_tree import PACKAGES, ROOT, Source, sources, unit_of

# Unit -> what it may import, at run time and under TYPE_CHECKING. Those in FREE may be imported by all others.
TABLE: dict[str, set[str]] = {
    "max_ray": set(),
    "errors": set(),
    "log": set(),
    "phases": {"log"},
    "private_files": set(),
    "settings": set(),
    "interfaces": set(),
    "gguf": set(),
    "host_memory": set(),
    "driver": set(),
    "quantization_files": set(),
    "graph": {"interfaces"},
    "output_parsers": set(),
    "config": {"settings", "interfaces", "output_parsers", "gguf"},
    "kv_cache": {"interfaces"},
    "kernels": {"interfaces", "settings", "host_memory", "private_files"},
    "structured_output": {"interfaces"},
    "distributed": {"driver", "interfaces", "kernels"},
    "weights": {"interfaces", "gguf", "host_memory"},
    "transport": {"interfaces"},
    "hub": {"gguf"},
    "huggingface": {"gguf", "hub", "quantization_files"},
    "sentence_files": {"gguf", "huggingface"},
    "tokenization": {"interfaces", "gguf", "sentence_files"},
    "images": {"interfaces", "huggingface", "tokenization"},
    "nn": {"interfaces", "kernels", "distributed", "driver", "weights", "huggingface", "host_memory"},
    "modeling": {
        *("interfaces", "config", "huggingface", "weights", "kernels", "distributed", "driver", "nn", "host_memory"),
    },
    "architecture": {"interfaces", "config", "modeling"},
    "custom_code": {"architecture", "settings", "private_files"},
    "registry": {"architecture", "config", "custom_code", "huggingface", "interfaces"},
    "planning": {
        *("interfaces", "config", "registry", "architecture", "custom_code", "huggingface", "sentence_files"),
        *("weights", "tokenization", "settings"),
    },
    "engine": {
        *("interfaces", "weights", "kernels", "distributed", "driver", "modeling", "host_memory", "sentence_files"),
        "structured_output",
    },
    "pipelines": {
        *("interfaces", "config", "registry", "architecture", "huggingface", "tokenization", "images", "kv_cache"),
        *("distributed", "modeling", "nn", "planning", "engine", "structured_output", "sentence_files"),
    },
    "scheduler": {"interfaces", "config", "kv_cache"},
    "actors": {
        *("interfaces", "settings", "config", "kv_cache", "planning", "pipelines", "distributed", "transport"),
    },
    "architectures": {
        *("interfaces", "config", "weights", "nn", "modeling", "kernels", "distributed", "images", "huggingface"),
        "pipelines",  # only `max_ray.pipelines.lib`, what authors of architectures import
    },
    "benchmark": {
        *("settings", "tokenization", "gguf", "host_memory", "interfaces", "huggingface", "weights", "driver"),
        *("distributed", "kernels", "nn", "modeling", "planning", "engine", "pipelines"),  # no server
        *("structured_output", "kv_cache", "scheduler"),
    },
    "conformance": {
        *("interfaces", "config", "registry", "architecture", "custom_code", "huggingface", "weights"),
        *("distributed", "modeling", "nn", "engine"),
    },
    "serve": {
        *("interfaces", "settings", "config", "output_parsers", "tokenization", "registry", "planning", "pipelines"),
        *("scheduler", "actors", "structured_output", "kv_cache", "private_files"),
    },
    "deployments": {  # with the examples and the demo's training
        *("interfaces", "settings", "config", "serve"),
        *("distributed", "modeling", "nn", "pipelines", "architectures"),
    },
    "chaos": {"settings", "benchmark", "planning"},
    "cli": {
        *("interfaces", "settings", "config", "huggingface", "registry", "tokenization", "planning", "pipelines"),
        *("benchmark", "chaos", "conformance", "serve", "deployments", "hub"),
    },
}
FREE = {"max_ray", "errors", "log", "phases"}

# Library -> the modules (and everything below them) that may import it.
FENCES: dict[str, set[str]] = {
    "ray": {*("max_ray.actors", "max_ray.serve", "max_ray.cli", "deployments")},
    "fastapi": {"max_ray.serve"},
    "starlette": {"max_ray.serve"},
    "uvicorn": {"max_ray.serve"},
    "triton": {"max_ray.kernels.gpu"},
    "transformers": {
        *("max_ray.tokenization.loading", "max_ray.conformance.reference", "deployments.demo"),
        *("max_ray.benchmark.synthetic", "max_ray.benchmark.transformers_peer"),
        "architectures.transformers_adapter",
    },
    "yaml": {"max_ray.config", "max_ray.cli", "max_ray.serve.api.access"},
    "PIL": {"max_ray.images"},
    "opentelemetry": {"max_ray.serve.api.tracing"},
    "llguidance": {"max_ray.structured_output"},
    "torch": {
        *("max_ray.driver", "max_ray.distributed", "max_ray.kernels", "max_ray.nn", "max_ray.weights"),
        *("max_ray.modeling", "max_ray.engine", "max_ray.pipelines", "max_ray.actors", "max_ray.conformance"),
        *("architectures", "deployments.demo"),
        *(f"max_ray.benchmark.{name}" for name in ("kernels", "kernel_cases", "quantized_cases", "offline", "timing")),
        *(f"max_ray.benchmark.{name}" for name in ("checkpoints", "loading", "synthetic", "transformers_peer")),
        "max_ray.benchmark.gpu",
        "deployments.examples",
        "max_ray.host_memory",
    },
}

# Modules of processes that run without torch: the HTTP replica, the registry, the KV manager, the command line.
WITHOUT_TORCH = [
    "max_ray.interfaces",
    "max_ray.settings",
    "max_ray.config",
    "max_ray.output_parsers",
    "max_ray.gguf.tokenizer",
    "max_ray.huggingface",
    "max_ray.weights",
    "max_ray.registry",
    "max_ray.custom_code",
    "max_ray.kv_cache",
    "max_ray.transport.listener",
    "max_ray.transport.worker_connection",
    "max_ray.structured_output",
    "max_ray.scheduler",
    "max_ray.tokenization.tokenizer",
    "max_ray.tokenization.detokenizer",
    "max_ray.images.tokenizer",
    "max_ray.graph.weights",
    "max_ray.pipelines",
    "max_ray.pipelines.core",
    "max_ray.pipelines.lib",
    "max_ray.planning.plan",
    "max_ray.pipelines.factory",
    "max_ray.pipelines.text_generation",
    "max_ray.pipelines.embeddings",
    "max_ray.tokenization.embeddings_tokenizer",
    "deployments",
    "max_ray.cli.main",
    "max_ray.benchmark.serving",
    "max_ray.serve.api.routes",
]
WITH_RAY = {"max_ray.actors", "max_ray.serve", "max_ray.cli"}
WITHOUT_TORCH_BUT_WITH_RAY = ["max_ray.actors.registry", "max_ray.actors.kv_manager", "max_ray.serve.ingress"]


def short(unit: str) -> str:
    return unit.removeprefix("max_ray.")


def is_within(module: str, places: set[str]) -> bool:
    return any(module == place or module.startswith(f"{place}.") for place in places)


def wrong_imports(source: Source) -> list[str]:
    """Imports of ours that the table does not allow."""
    own = short(source.unit)
    wrong = []
    for found in source.all_imports:
        if found.module.split(".")[0] not in PACKAGES:
            continue
        other = short(unit_of(found.module))
        if other == own or (other in FREE and own not in FREE):
            continue
        if own not in TABLE or other not in TABLE[own]:
            wrong.append(f"{source.path}:{found.line}: {source.module} imports {found.module}")
    return wrong


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_follow_the_table(package: str) -> None:
    assert [
        wrong for source in sources() if source.module.split(".")[0] == package for wrong in wrong_imports(source)
    ] == []


def test_the_table_has_no_circle_and_no_unknown_name() -> None:
    units = {short(source.unit) for source in sources()}
    assert units == set(TABLE)
    assert {name for allowed in TABLE.values() for name in allowed} <= set(TABLE)
    assert len(list(TopologicalSorter(TABLE).static_order())) == len(TABLE)


def test_architectures_import_only_the_authors_part_of_pipelines() -> None:
    used = {found.module for source in sources() if source.unit == "architectures" for found in source.imports}
    assert {module for module in used if module.startswith("max_ray.pipelines")} <= {"max_ray.pipelines.lib"}


def test_modules_load_in_some_order() -> None:
    """No circle among the imports that run when a module is loaded."""
    ours = {source.module: source for source in sources()}
    graph = {
        name: {found.module for found in source.imports if not found.late and found.module in ours} - {name}
        for name, source in ours.items()
    }
    assert len(list(TopologicalSorter(graph).static_order())) == len(ours)


@pytest.mark.parametrize("library", sorted(FENCES))
def test_libraries_stay_behind_their_fences(library: str) -> None:
    outside = [
        f"{source.path}:{found.line}"
        for source in sources()
        for found in source.imports
        if found.module.split(".")[0] == library and not is_within(source.module, FENCES[library])
    ]
    assert outside == []


def test_only_settings_reads_the_environment() -> None:
    names = {"os.environ", "os.getenv", "os.putenv", "os.environb"}
    readers = {
        source.module
        for source in sources()
        for node in ast.walk(source.tree)
        if (isinstance(node, ast.Attribute) and ast.unparse(node) in names)
        or (
            isinstance(node, ast.ImportFrom)
            and node.module == "os"
            and {a.name for a in node.names} & {"environ", "getenv"}
        )
    }
    assert readers == {"max_ray.settings", "max_ray.serve.haproxy_launcher"}  # it runs without the package


def loaded_by(modules: list[str], libraries: set[str]) -> str:
    """Which of `libraries` a fresh process has loaded after importing `modules`."""
    code = (
        "import importlib, sys\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        f"print(' '.join(sorted({libraries!r} & set(sys.modules))))\n"
    )
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return result.stdout.strip()


def test_light_processes_load_no_heavy_library() -> None:
    assert loaded_by(WITHOUT_TORCH, {"torch", "ray", "architectures"}) == ""


def test_a_bare_gpu_machine_needs_no_pydantic() -> None:
    """Networks, the runner and the benchmarks of a device run where only torch and transformers are."""
    modules = ["max_ray.engine.runner", "max_ray.engine.graphs", "architectures.llama3.model"]
    modules += ["max_ray.benchmark.kernels", "max_ray.benchmark.offline"]
    modules += [f"max_ray.benchmark.gpu.{name}" for name in ("__main__", "probe", "serving_loop", "profile", "machine")]
    modules += ["max_ray.transport.worker_connection", "max_ray.transport.listener"]
    absent = {"pydantic", "ray", "fastapi", "msgspec", "gguf", "prometheus_client"}
    assert loaded_by(modules, absent) == ""


def test_actors_without_a_model_load_no_torch() -> None:
    assert loaded_by(WITHOUT_TORCH_BUT_WITH_RAY, {"torch", "architectures"}) == ""


def test_the_library_works_without_ray() -> None:
    modules = [
        source.module
        for source in sources()
        if source.module.startswith("max_ray") and not is_within(source.module, WITH_RAY)
    ]
    assert len(modules) > 50
    assert loaded_by([*modules, "architectures.llama3"], {"ray", "fastapi", "starlette"}) == ""


def test_the_http_api_works_without_ray_and_torch() -> None:
    modules = [source.module for source in sources() if is_within(source.module, {"max_ray.serve.api"})]
    assert len(modules) > 15
    assert loaded_by(modules, {"ray", "torch", "architectures"}) == ""


def levels() -> list[list[str]]:
    """Units by level: each imports from the levels before its own only."""
    sorter = TopologicalSorter(TABLE)
    sorter.prepare()
    found: list[list[str]] = []
    while sorter.is_active():
        ready = sorted(sorter.get_ready())
        found.append(ready)
        sorter.done(*ready)
    return found


def test_architecture_md_has_the_levels() -> None:
    text = (ROOT / "max_ray" / "ARCHITECTURE.md").read_text(encoding="utf-8")
    for number, units in enumerate(levels()):
        row = f"| {number} | {', '.join(f'`{unit}`' for unit in units)} |"
        assert row in text, f"ARCHITECTURE.md lacks the line\n{row}"


if __name__ == "__main__":
    for number, units in enumerate(levels()):
        print(f"| {number} | {', '.join(f'`{unit}`' for unit in units)} |")

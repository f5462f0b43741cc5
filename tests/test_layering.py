"""Imports point down. The table says who may import whom; heavy libraries stay behind their fences.

What stands under TYPE_CHECKING is free. An import inside a function counts as any other, except the few in LATE.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter

import pytest

from tests.source_tree import PACKAGES, Source, sources, unit_of

# Unit -> what it may import. `max_ray`, `errors` and `log` are free to all but each other.
TABLE: dict[str, set[str]] = {
    "max_ray": set(),
    "errors": set(),
    "log": set(),
    "phases": {"log"},
    "settings": set(),
    "interfaces": set(),
    "gguf": set(),
    "host_memory": set(),
    "hub": {"gguf"},
    "quantization_files": set(),
    "huggingface": {"gguf", "hub", "quantization_files"},
    "driver": set(),
    "distributed": {"driver", "interfaces", "kernels"},
    "kernels": {"interfaces", "settings", "host_memory"},
    "graph": {"interfaces"},
    "detokenizer": set(),
    "tokenizer_files": {"gguf"},
    "template_limits": set(),
    "template_sandbox": {"template_limits"},
    "chat_template": {"template_sandbox", "template_limits"},
    "control_tokens": set(),
    "piece_encoder": set(),
    "tokenizer": {
        *("interfaces", "gguf", "tokenizer_files", "chat_template", "control_tokens", "piece_encoder"),
        "template_limits",
    },
    "images": {"interfaces", "huggingface", "tokenizer"},
    "token_text": {"tokenizer", "detokenizer"},
    "sentence_files": {"huggingface"},
    "embeddings_tokenizer": {"interfaces", "tokenizer", "sentence_files"},
    "kv_cache": {"interfaces"},
    "weights": {"interfaces", "gguf", "host_memory"},
    "config": {"settings", "interfaces"},
    "nn": {"interfaces", "kernels", "distributed", "driver", "weights", "huggingface", "host_memory"},
    "architecture": {"interfaces", "config"},
    "custom_code": {"architecture", "settings"},
    "registry": {"architecture", "config", "custom_code", "huggingface", "interfaces"},
    "scheduler": {"interfaces", "config", "kv_cache"},
    "pipelines": {
        *("interfaces", "config", "registry", "architecture", "custom_code", "huggingface", "weights"),
        *("tokenizer", "images", "kv_cache", "kernels", "distributed", "driver", "nn"),
        *("sentence_files", "embeddings_tokenizer", "host_memory"),
    },
    "benchmark": {
        *("settings", "tokenizer", "gguf", "host_memory"),
        *("interfaces", "huggingface", "weights", "driver", "distributed", "kernels", "nn", "pipelines"),  # no server
    },
    "conformance": {
        *("interfaces", "config", "registry", "architecture", "huggingface", "weights", "distributed", "pipelines"),
        *("nn", "custom_code"),
    },
    "actors": {
        *("interfaces", "settings", "config", "registry", "custom_code", "huggingface", "kv_cache", "scheduler"),
        *("pipelines", "distributed", "tokenizer"),
    },
    "architectures": {
        *("interfaces", "config", "weights", "nn", "kernels", "distributed", "tokenizer", "images", "huggingface"),
        "pipelines",  # only `max_ray.pipelines.lib`, what authors of architectures import
    },
}
FREE = {"max_ray", "errors", "log", "phases"}

# (unit, imported unit): imports inside a function that close a circle of modules, not of load times.
LATE = {("custom_code", "registry")}

# Library -> the modules (and everything below them) that may import it.
FENCES: dict[str, set[str]] = {
    "ray": {"max_ray.actors", "deployments"},
    "fastapi": {"deployments"},
    "starlette": {"deployments"},
    "uvicorn": {"deployments"},
    "triton": {"max_ray.kernels.gpu"},
    "transformers": {
        *("max_ray.tokenizer_files", "max_ray.conformance.reference", "deployments.demo"),
        *("max_ray.benchmark.synthetic", "max_ray.benchmark.transformers_peer"),
        "architectures.transformers_adapter",
    },
    "yaml": {"max_ray.config", "deployments"},
    "PIL": {"max_ray.images"},
    "torch": {
        *("max_ray.driver", "max_ray.distributed", "max_ray.kernels", "max_ray.nn", "max_ray.weights"),
        *("max_ray.pipelines", "max_ray.actors", "max_ray.conformance", "architectures", "deployments.demo"),
        *(f"max_ray.benchmark.{name}" for name in ("kernels", "kernel_cases", "quantized_cases", "offline", "timing")),
        *(f"max_ray.benchmark.{name}" for name in ("checkpoints", "loading", "synthetic", "transformers_peer")),
        "deployments.examples",
        "max_ray.host_memory",
    },
}

# Modules of processes that run without torch: the HTTP replica, the registry, the KV manager, the command line.
WITHOUT_TORCH = [
    "max_ray.interfaces",
    "max_ray.settings",
    "max_ray.config",
    "max_ray.gguf.tokenizer",
    "max_ray.huggingface",
    "max_ray.weights",
    "max_ray.registry",
    "max_ray.custom_code",
    "max_ray.kv_cache",
    "max_ray.scheduler",
    "max_ray.tokenizer",
    "max_ray.detokenizer",
    "max_ray.images.tokenizer",
    "max_ray.graph.weights",
    "max_ray.pipelines",
    "max_ray.pipelines.core",
    "max_ray.pipelines.lib",
    "max_ray.pipelines.plan",
    "max_ray.pipelines.factory",
    "max_ray.pipelines.text_generation",
    "max_ray.pipelines.embeddings",
    "max_ray.embeddings_tokenizer",
    "deployments",
    "deployments.cli",
    "max_ray.benchmark.serving",
    "deployments.routes",
]
WITHOUT_TORCH_BUT_WITH_RAY = ["max_ray.actors.registry", "max_ray.actors.kv_manager", "deployments.ingress"]


def short(unit: str) -> str:
    return unit.removeprefix("max_ray.")


def is_within(module: str, places: set[str]) -> bool:
    return any(module == place or module.startswith(f"{place}.") for place in places)


def wrong_imports(source: Source) -> list[str]:
    """Imports of ours that the table does not allow."""
    own = short(source.unit)
    wrong = []
    for found in source.imports:
        if found.module.split(".")[0] not in PACKAGES:
            continue
        other = short(unit_of(found.module))
        if other == own or (other in FREE and own not in FREE) or (found.late and (own, other) in LATE):
            continue
        if own not in TABLE or other not in TABLE[own]:
            wrong.append(f"{source.path}:{found.line}: {source.module} imports {found.module}")
    return wrong


@pytest.mark.parametrize("package", ["max_ray", "architectures"])
def test_imports_follow_the_table(package: str) -> None:
    assert [
        wrong for source in sources() if source.module.split(".")[0] == package for wrong in wrong_imports(source)
    ] == []


def test_the_table_has_no_circle_and_no_unknown_name() -> None:
    units = {short(source.unit) for source in sources()}
    assert units - {"deployments"} <= set(TABLE)
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
    assert readers == {"max_ray.settings"}


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
    modules = ["max_ray.pipelines.runner", "max_ray.pipelines.graphs", "architectures.llama3.model"]
    modules += ["max_ray.benchmark.kernels", "max_ray.benchmark.offline"]
    assert loaded_by(modules, {"pydantic", "ray", "fastapi"}) == ""


def test_actors_without_a_model_load_no_torch() -> None:
    assert loaded_by(WITHOUT_TORCH_BUT_WITH_RAY, {"torch", "architectures"}) == ""


def test_the_library_works_without_ray() -> None:
    modules = [
        s.module for s in sources() if s.module.startswith("max_ray") and not is_within(s.module, {"max_ray.actors"})
    ]
    assert len(modules) > 50
    assert loaded_by([*modules, "architectures.llama3"], {"ray", "fastapi", "starlette"}) == ""

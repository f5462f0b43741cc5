"""The command line, through `main`: what is printed, what is refused, what reaches the configuration."""

from __future__ import annotations

import io
import json
import logging
import os
import shlex
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import max_ray
from max_ray.cli import flags, generate
from max_ray.cli import main as cli
from max_ray.config import PipelineConfig, ServeConfig
from max_ray.log import setup_logging
from max_ray.serve.serve_config import DEMO_MODEL, load_serve_config
from tests.checkpoints import make_llama


@pytest.fixture(autouse=True)
def _quiet_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MAX_RAY_CONFIG", "MAX_RAY_API_KEYS", "MAX_RAY_MODEL_PATH"):
        monkeypatch.delenv(name, raising=False)
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("models") / "tiny", hidden_size=16)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[ServeConfig]:
    """Configurations that reached the server; nothing is started."""
    configs: list[ServeConfig] = []
    fake = types.ModuleType("deployments.builder")
    fake.serve_main = configs.append  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "deployments.builder", fake)
    return configs


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr."""
    assert cli.main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("max-ray: error: ")
    assert output.err.count("\n") == 1
    return output.err


def test_every_setting_is_a_flag(served: list[ServeConfig], tmp_path: Path) -> None:
    keys = tmp_path / "keys.yaml"
    keys.write_text(f"keys: [{{name: a, sha256: {64 * '0'}}}]\n")
    keys.chmod(0o600)
    for name in ("cert.pem", "key.pem"):
        (tmp_path / name).touch(0o600)
    values: dict[str, Any] = {
        "model_path": "owner/name",
        "revision": "v1",
        "served_model_name": "x",
        "served_model_aliases": ("y", "z"),
        "task": "text_generation",
        "quantization_encoding": "float32",
        "max_length": 5,
        "max_batch_size": 6,
        "max_batch_input_tokens": 7,
        "enable_chunked_prefill": False,
        "max_num_steps": 8,
        "kv_cache_page_size": 9,
        "kv_cache_memory": 0.25,
        "device_memory_utilization": 0.5,
        "enable_prefix_caching": False,
        "expert_parallel": True,
        "tensor_parallel_size": 2,
        "devices": "cpu",
        "custom_architectures": ("./a", "./b", "./c"),
        "cuda_graphs": "start",
        "allowed_image_root": "pictures",
        "max_images": 4,
        "max_image_bytes": 5,
        "max_image_pixels": 6,
        "allow_special_tokens_in_messages": True,
        "tool_call_parser": "hermes",
        "reasoning_parser": "none",
        "num_threads": 3,
        "host": "localhost",
        "port": 1234,
        "ssl_certfile": str(tmp_path / "cert.pem"),
        "ssl_keyfile": str(tmp_path / "key.pem"),
        "api_keys_file": str(keys),
        "files_dir": "files",
        "files_max_bytes": 2**21,
        "batch_concurrency": 3,
        "max_queued_tokens": 900,
        "app_name": "app",
        "front_replicas": 2,
        "max_surge_percent": 50,
        "otlp_traces_endpoint": "http://127.0.0.1:4318/v1/traces",
        "max_stream_s": 900,
        "resume_grace_s": 2.0,
        "drain_timeout_s": 7.5,
        "min_replicas": 2,
        "scale_to_zero_after_s": 0.5,
        "max_replicas": 3,
        "target_ongoing_requests": 4.5,
        "max_queued_requests": 0,
        "lease_grace_s": 1.5,
        "worker_start_timeout_s": 2.5,
        "collective_timeout_s": 3.5,
        "worker_port_range": "20000-20999",
        "allowed_hosts": ("box.lan", "*.x.org"),
        "allowed_origins": ("https://x.org", "null"),
    }
    assert set(values) == set(ServeConfig.model_fields) - {"api_keys", "models"}
    arguments = ["serve"]
    for name, value in values.items():
        flag = "--" + name.replace("_", "-")
        if value is False:
            arguments.append(flag.replace("--", "--no-", 1))
        elif value is True:
            arguments.append(flag)
        elif name == "custom_architectures":
            arguments += [flag, "./a", flag, "./b,./c"]
        elif isinstance(value, tuple):
            arguments += [flag, ",".join(value)]
        else:
            arguments += [flag, str(value)]
    assert cli.main(arguments) == 0
    assert served == [ServeConfig(**values)]


def test_model_is_an_alias_as_the_page_prints_it(served: list[ServeConfig]) -> None:
    assert cli.main(["serve", "--custom-architectures", "./my_model", "--model", "path/to/weights"]) == 0
    assert served[0].model_path == "path/to/weights"
    assert served[0].custom_architectures == ("./my_model",)


def test_without_a_model_the_bundled_one_is_served(served: list[ServeConfig]) -> None:
    assert cli.main(["serve", "--port", "8001"]) == 0
    assert (served[0].model_path, served[0].served_model_name, served[0].port) == (str(DEMO_MODEL), "shakespeare", 8001)
    config, _ = load_serve_config({"served_model_name": "mine"}, environ={})
    assert (config.model_path, config.served_model_name) == (str(DEMO_MODEL), "mine")


def test_file_environment_and_flags(served: list[ServeConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("model_path: from/file\nport: 1\nmax_length: 1\nmax_batch_size: 1\n")
    monkeypatch.setenv("MAX_RAY_PORT", "2")
    monkeypatch.setenv("MAX_RAY_MAX_LENGTH", "2")
    assert cli.main(["serve", "--config", str(file), "--max-length", "3"]) == 0
    config = served[0]
    assert (config.model_path, config.max_batch_size, config.port, config.max_length) == ("from/file", 1, 2, 3)


def test_mistakes_are_one_sentence(
    capsys: pytest.CaptureFixture[str], served: list[ServeConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "has no option '--max-lenght'. Did you mean '--max-length'?" in refused(capsys, "serve", "--max-lenght", "5")
    assert "has no option '--max-len'." in refused(capsys, "serve", "--max-len=5")
    assert "has no option 'stray'." in refused(capsys, "serve", "stray")
    assert "COMMAND" in refused(capsys)
    assert "'serv'" in refused(capsys, "serv")
    assert "port should be" in refused(capsys, "serve", "--port", "http")
    assert "--port" in refused(capsys, "serve", "--port")
    assert "no configuration file" in refused(capsys, "serve", "--config", "/none.yaml")
    assert "MAX_RAY_API_KEYS" in refused(capsys, "serve", "--host", "0.0.0.0")
    assert "no option '--api-keys'" in refused(capsys, "serve", "--api-keys", "hush")
    assert "no option '--port'" in refused(capsys, "generate", "--port", "1")
    assert "--prompt" in refused(capsys, "generate")
    assert "temperature" in refused(capsys, "generate", "--prompt", "x", "--temperature", "-1")
    assert "not allowed with argument" in refused(capsys, "generate", "--prompt", "x", "--raw", "--chat")
    assert "--top-k" in refused(capsys, "generate", "--prompt", "x", "--top-k", "many")
    monkeypatch.setenv("MAX_RAY_LOG_LEVEL", "loud")
    assert "MAX_RAY_LOG_LEVEL" in refused(capsys, "version")
    assert served == []


@pytest.mark.parametrize("command", ["serve", "generate"])
def test_models_that_cannot_be_had(command: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def said(path: str | Path, *more: str) -> str:
        return refused(capsys, command, "--model-path", str(path), "--print-config", *more)

    assert "There is no folder /no/such/model" in said("/no/such/model")
    assert "There is no config.json" in said(tmp_path)
    (tmp_path / "config.json").write_text('{"architectures": ["LamaForCausalLM"]}')
    assert "No architecture LamaForCausalLM is known. Did you mean 'LlamaForCausalLM'?" in said(tmp_path)
    assert "is a file" in said(tmp_path / "config.json")
    assert "quantization_encoding=awq needs a checkpoint in that encoding" in said(
        DEMO_MODEL, "--quantization-encoding", "awq"
    )
    assert "has no __init__.py" in said(DEMO_MODEL, "--custom-architectures", str(tmp_path))


def test_print_config_shows_values_and_origins(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text("max_num_steps: 4\n")
    monkeypatch.setenv("MAX_RAY_MAX_BATCH_SIZE", "3")
    monkeypatch.setenv("MAX_RAY_API_KEYS", "hush")
    arguments = ["--config", str(file), "--max-length", "99", "--kv-cache-memory", "0.01"]
    assert cli.main(["serve", *arguments, "--print-config"]) == 0
    output = capsys.readouterr().out
    rows = {line.split()[0]: line.split(maxsplit=2) for line in output.splitlines()}
    assert rows["setting"] == ["setting", "value", "origin"]
    assert rows["max_length"][1:] == ["99", "command line"]
    assert rows["max_num_steps"][1:] == ["4", f"file {file}"]
    assert rows["max_batch_size"][1:] == ["3", "environment MAX_RAY_MAX_BATCH_SIZE"]
    assert rows["port"][1:] == ["8000", "default"]
    assert rows["model_path"][1:] == [str(DEMO_MODEL), "default: the bundled demo model"]
    assert rows["quantization_encoding"][1:] == ["bfloat16", "model: dtype in config.json"]
    assert rows["num_threads"][2].startswith(("hardware: ", "model: "))
    assert rows["kv_cache_blocks"][2] == "all that a batch can use: 3 requests of 99 tokens"
    assert rows["architecture"][1:] == ["LlamaForCausalLM", "model: config.json"]
    assert set(rows) >= set(ServeConfig.model_fields)
    assert "hush" not in output


def test_generate_continues_a_prompt(capsys: pytest.CaptureFixture[str], model_path: Path) -> None:
    def text(*arguments: str) -> str:
        options = ["--max-new-tokens", "5", "--seed", "7", *arguments]
        assert cli.main(["generate", "--model-path", str(model_path), "--prompt", "abc", *options]) == 0
        return capsys.readouterr().out

    greedy = text("--temperature", "0")
    assert greedy.endswith("\n")
    assert len(greedy) > 1
    assert greedy == text("--top-k", "1")
    assert text() == text()
    assert text("--chat", "--temperature", "0") == greedy, "this model has a chat template"
    assert text("--raw", "--temperature", "0") != greedy
    assert text("--system", "Be brief.", "--temperature", "0") != greedy
    assert text("--temperature", "0", "--max-tokens", "2") == text("--temperature", "0", "--max-new-tokens", "2")
    assert text("--temperature", "0", "--stop", greedy[:1]) == "\n"
    for penalty in ("--frequency-penalty", "--presence-penalty"):
        assert text("--temperature", "0", "--max-tokens", "40", penalty, "2") != text(
            "--temperature", "0", "--max-tokens", "40"
        ), penalty
    assert text("--temperature", "0", "--repetition-penalty", "1000") != greedy


def test_generate_without_a_chat_template_continues(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    model = make_llama(tmp_path / "base", hidden_size=16)
    (model / "chat_template.jinja").unlink()
    arguments = ["generate", "--model-path", str(model), "--prompt", "abc", "--max-tokens", "5", "--temperature", "0"]
    assert cli.main(arguments) == 0
    text = capsys.readouterr().out
    assert cli.main([*arguments, "--raw"]) == 0
    assert capsys.readouterr().out == text
    for wrong in (["--chat"], ["--system", "x"]):
        assert cli.main([*arguments, *wrong]) == 2
        assert "has no chat template" in capsys.readouterr().err


def test_generate_says_what_it_loads(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["generate", "--prompt", "abc", "--max-tokens", "1"]
    assert cli.main(arguments) == 0
    assert capsys.readouterr().err == "Loading shakespeare ...\n"

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    setup_logging("WARNING")
    monkeypatch.setattr(generate, "_REFRESH_S", 0.01)
    with generate.loading_progress("m", terminal):
        logging.getLogger("max_ray.phases").info("startup: load took %s", "3 s")
        while "load took 3 s" not in terminal.getvalue():
            time.sleep(0.01)
    assert "\r\x1b[KLoading m: 0 s" in terminal.getvalue()
    assert terminal.getvalue().endswith("\r\x1b[K"), "the line is gone"
    logging.getLogger("max_ray.phases").info("later")
    assert "later" not in terminal.getvalue() + capsys.readouterr().err
    assert logging.getLogger("max_ray").level == logging.WARNING
    setup_logging()


def test_each_command_has_an_example_that_parses(capsys: pytest.CaptureFixture[str]) -> None:
    for name, (_, example) in cli._COMMANDS.items():
        with pytest.raises(SystemExit):
            cli.main([name, "--help"])
        assert f"example:\n  max-ray {example}" in capsys.readouterr().out
        assert cli._parse(shlex.split(example))["command"] == name


def test_help_is_grouped_and_encode_shows_what_embeddings_use(capsys: pytest.CaptureFixture[str]) -> None:
    def help_of(command: str) -> str:
        with pytest.raises(SystemExit):
            cli.main([command, "--help"])
        return capsys.readouterr().out

    for title in ("model:", "batches and KV cache:", "devices:", "HTTP server:", "replicas and workers:"):
        assert f"\n{title}\n" in help_of("serve")
    shown = help_of("encode")
    assert "--max-batch-size" in shown
    for name in ("--kv-cache-memory", "--cuda-graphs", "--max-num-steps", "--max-images", "--tool-call-parser"):
        assert name not in shown
        assert f"no option '{name}'" in refused(capsys, "encode", "--model-path", "m", name, "1")
    named = {name for members in flags._GROUPS.values() for name in members}
    assert named <= set(ServeConfig.model_fields)
    assert set(flags.POOLED_SETTINGS) <= set(PipelineConfig.model_fields)


def test_several_served_names(served: list[ServeConfig], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "--served-model-name", "a", "b", "--served-model-name", "c,d", "--port", "1"]) == 0
    assert (served[0].served_model_name, served[0].served_model_aliases) == ("a", ("b", "c", "d"))


def test_pull_says_in_a_sentence_what_it_cannot_have(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert "is no repository of the hub" in refused(capsys, "pull", "/some/folder")
    command = [sys.executable, "-m", "max_ray.cli.main", "pull", "owner/name"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        "max-ray: error: There is no folder owner/name, and the Hugging Face repository owner/name could not be had: "
        "it is not in the local cache, and HF_HUB_OFFLINE is set.\n"
    )


def test_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["list", "--json"]) == 0
    families = json.loads(capsys.readouterr().out)["architectures"]
    llama = next(family for family in families if family["name"] == "LlamaForCausalLM")
    assert llama["task"] == "text_generation"
    assert {"bfloat16", "float32"} <= set(llama["encodings"])
    assert llama["modalities"] == ["text"]
    assert llama["default_encoding"] in llama["encodings"]
    assert cli.main(["list"]) == 0
    head = ["architecture", "task", "modalities", "encodings", "examples"]
    assert capsys.readouterr().out.splitlines()[0].split() == head


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["version"]) == 0
    assert capsys.readouterr().out == f"{max_ray.__version__}\n"


def test_help_prints_each_default_once(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["serve", "--help"])
    assert stopped.value.code == 0
    output = " ".join(capsys.readouterr().out.split())
    for name, field in ServeConfig.model_fields.items():
        if name not in ("api_keys", "models"):
            assert f"--{name.replace('_', '-')}" in output
            assert " ".join((field.description or "").split()) in output.replace("- ", "-")
    assert "Default: 8000." in output
    assert set(PipelineConfig.model_fields) < set(ServeConfig.model_fields)


def test_light_commands_import_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from max_ray.cli import main as cli\n"
        "assert cli.main(['version']) == 0\n"
        "assert cli.main(['serve', '--prot', '1']) == 2\n"
        "heavy = {'torch', 'ray', 'transformers', 'fastapi'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_a_reader_that_stops_reading(tmp_path: Path) -> None:
    """As `max-ray list | head -1` does: no traceback."""
    command = f"set -o pipefail; {sys.executable} -m max_ray.cli.main list --json | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (141, "")

"""Every code block of the pipeline page runs, with `max` read as `max_ray` and a tiny local checkpoint as the model.

First our own use of what each block calls, with assertions. Then, where the page itself lies beside the repository,
its blocks as printed.
"""

from __future__ import annotations

import ast
import asyncio
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from max_ray.cli import main as cli
from max_ray.driver import CPU, accelerator_count
from max_ray.errors import DeviceError
from max_ray.graph.weights import WeightsFormat
from max_ray.interfaces import (
    KVCacheStrategy,
    PipelineTask,
    RequestID,
    TextGenerationInputs,
    TextGenerationRequest,
)
from max_ray.nn.legacy.kv_cache import KVCacheStrategy as KVCacheStrategyOfThePage
from max_ray.pipelines import PIPELINE_REGISTRY, PipelineConfig
from max_ray.pipelines.core import TextContext
from max_ray.pipelines.lib import (
    ModelInputs,
    ModelOutputs,
    PipelineModel,
    RopeType,
    SupportedArchitecture,
    SupportedEncoding,
    TextTokenizer,
)
from tests.checkpoints import make_llama

PAGE = Path(__file__).parents[2] / "shared" / "seeds" / "model-pipeline-page.txt"
PAGE_MODEL = "meta-llama/Llama-3.1-8B-Instruct"
CUSTOM_MODEL = "from architectures.llama3.model import Llama3Model\n\n\nclass MyModel(Llama3Model):\n    pass\n"


@pytest.fixture(autouse=True)
def _one_thread_and_a_clean_registry() -> Any:
    torch.set_num_threads(1)
    yield
    PIPELINE_REGISTRY.reset()


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=512, hidden_size=16)


@pytest.fixture(scope="module")
def custom_model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights that only a custom architecture can read, by the name in their config.json."""
    path = make_llama(tmp_path_factory.mktemp("models") / "custom", dtype=torch.bfloat16)
    config = path / "config.json"
    config.write_text(config.read_text().replace('"LlamaForCausalLM"', '"MyModelForCausalLM"'))
    return path


def generate(tokenizer: Any, pipeline: Any, prompt: str, max_new_tokens: int) -> list[int]:
    """The page's loop, shortened."""
    request = TextGenerationRequest(
        RequestID(), prompt=prompt, sampling_params={"max_new_tokens": max_new_tokens, "temperature": 0}
    )
    context = asyncio.run(tokenizer.new_context(request))
    pipeline.kv_managers[0].claim(context.request_id)
    while not context.is_done:
        pipeline.kv_managers[0].alloc(context, num_steps=1)
        pipeline.execute(TextGenerationInputs[TextContext](batches=[{context.request_id: context}], num_steps=1))
    pipeline.release(context.request_id)
    return context.tokens.generated.tolist()


# -- our own use of what each block calls ------------------------------------------------------------------------


def test_modules_list_their_weights_and_move(capsys: pytest.CaptureFixture[str]) -> None:
    from max_ray.driver import Accelerator
    from max_ray.nn import Linear, Module

    class MLP(Module):
        fc1: Linear
        fc2: Linear

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc2(self.fc1(x))

    model = MLP(fc1=Linear(10, 20), fc2=Linear(20, 5))
    for name, param in model.parameters:
        print(f"{name}: {param.shape}")
    assert capsys.readouterr().out.splitlines() == [
        "fc1.weight: [20, 10]",
        "fc1.bias: [20]",
        "fc2.weight: [5, 20]",
        "fc2.bias: [5]",
    ]
    model.to(CPU())
    assert model(torch.ones(3, 10)).shape == (3, 5)
    if accelerator_count() == 0:
        with pytest.raises(DeviceError, match="GPU"):
            Accelerator()
    else:
        model.to(Accelerator())


def test_request_example(model_path: Path) -> None:
    config = PipelineConfig(model_path=str(model_path), max_length=64)
    assert config.model_path == config.model.model_path == str(model_path)
    tokenizer, pipeline = PIPELINE_REGISTRY.retrieve(config)
    kv_cache_manager = pipeline.kv_managers[0]  # type: ignore[attr-defined]
    request = TextGenerationRequest(request_id=RequestID(), model_name=config.model_path, prompt="Explain networks")
    context = asyncio.run(tokenizer.new_context(request))
    kv_cache_manager.claim(context.request_id)
    tokens: list[int] = []
    text = ""
    while True:
        kv_cache_manager.alloc(context, num_steps=1)
        inputs = TextGenerationInputs[TextContext](batches=[{context.request_id: context}], num_steps=1)
        output = pipeline.execute(inputs)[context.request_id]
        assert len(output.tokens) == 1
        for token in output.tokens:
            tokens.append(token)
            text += asyncio.run(tokenizer.decode(token, skip_special_tokens=True))
        if output.is_done:
            break
    assert tokens == context.tokens.generated.tolist()
    assert context.is_done
    assert len(context.tokens) == 64 or tokens[-1] in context.eos_token_ids
    assert isinstance(text, str)
    pipeline.release(context.request_id)


def test_factory_pickles_and_builds_the_same_pipeline(model_path: Path) -> None:
    config = PipelineConfig(model_path=str(model_path))
    tokenizer, pipeline = PIPELINE_REGISTRY.retrieve(config)
    _, factory = PIPELINE_REGISTRY.retrieve_factory(config)
    moved = pickle.loads(pickle.dumps(factory))
    assert generate(tokenizer, moved(), "abc", 8) == generate(tokenizer, pipeline, "abc", 8)


def test_supported_architecture_record_with_all_its_fields() -> None:
    class Llama3Model(PipelineModel):
        pass

    def adapt(*arguments: Any) -> None: ...

    record = SupportedArchitecture(
        name="LlamaForCausalLM",
        task=PipelineTask.TEXT_GENERATION,
        example_repo_ids=[PAGE_MODEL],
        default_encoding=SupportedEncoding.q4_k,
        supported_encodings={
            SupportedEncoding.bfloat16: [KVCacheStrategyOfThePage.PAGED],
            SupportedEncoding.q4_k: [KVCacheStrategyOfThePage.PAGED],
        },
        pipeline_model=Llama3Model,
        tokenizer=TextTokenizer,
        default_weights_format=WeightsFormat.safetensors,
        weight_adapters={WeightsFormat.safetensors: adapt, WeightsFormat.gguf: adapt},
        rope_type=RopeType.normal,
        multi_gpu_supported=True,
    )
    assert record.context_type is TextContext
    assert record.weight_adapters[WeightsFormat.gguf] is adapt
    assert KVCacheStrategyOfThePage is KVCacheStrategy


def test_pipeline_model_names_exactly_the_methods_of_the_page() -> None:
    assert PipelineModel.__abstractmethods__ == {
        "calculate_max_seq_len",
        "execute",
        "prepare_initial_token_inputs",
        "prepare_next_token_inputs",
    }
    assert {ModelInputs.__name__, ModelOutputs.__name__} == {"ModelInputs", "ModelOutputs"}


def test_pipeline_config_flow() -> None:
    config = PipelineConfig(model_path=PAGE_MODEL, max_length=4096, max_batch_size=32)
    assert (config.max_length, config.max_batch_size, config.served_model_name) == (4096, 32, PAGE_MODEL)


# -- the page's blocks as printed --------------------------------------------------------------------------------

needs_page = pytest.mark.skipif(not PAGE.is_file(), reason="the page does not lie beside the repository")


def code_blocks(text: str) -> list[str]:
    """The page's Python: from a line that begins a block, as many lines as still parse."""
    lines = text.splitlines()
    blocks: list[str] = []
    position = 0
    while position < len(lines):
        length = (
            _longest_code(lines[position:])
            if re.match(r"from max\b|import asyncio|# my_model/", lines[position])
            else 0
        )
        if length:
            blocks.append("\n".join(lines[position : position + length]))
        position += max(1, length)
    return blocks


def _longest_code(lines: list[str]) -> int:
    def parses(count: int) -> bool:
        try:
            ast.parse("\n".join(lines[:count]))
        except SyntaxError:
            return False
        return True

    return max((count for count in range(1, min(len(lines), 90)) if parses(count)), default=0)


def page_block(marker: str, model_path: Path | None = None) -> str:
    """The one block that holds `marker`, as ours."""
    found = [block for block in code_blocks(PAGE.read_text()) if marker in block]
    assert len(found) == 1, f"{len(found)} blocks hold {marker!r}"
    code = re.sub(r"\bfrom max\.", "from max_ray.", found[0])
    return code if model_path is None else code.replace(PAGE_MODEL, str(model_path))


def run_block(code: str, **names: Any) -> dict[str, Any]:
    exec(compile(code, "page", "exec"), names)
    return names


@needs_page
def test_all_blocks_of_the_page_are_found() -> None:
    assert len(code_blocks(PAGE.read_text())) == 8


@needs_page
def test_page_modules(capsys: pytest.CaptureFixture[str]) -> None:
    code = page_block("class MLP(Module)")
    if accelerator_count() == 0:
        with pytest.raises(DeviceError):
            run_block(code)
        assert "fc2.bias: [5]" in capsys.readouterr().out
        code = code.replace("Accelerator", "CPU")
    run_block(code)
    assert capsys.readouterr().out.splitlines()[0] == "fc1.weight: [20, 10]"


@needs_page
def test_page_request_example(model_path: Path) -> None:
    names = run_block(page_block("generated_text", model_path))
    assert names["output"][names["context"].request_id].is_done


@needs_page
def test_page_registry(model_path: Path) -> None:
    names = run_block(page_block("pipeline_factory", model_path))
    assert generate(names["tokenizer"], names["pipeline"], "abc", 4)


@needs_page
def test_page_record() -> None:
    code = page_block("llama_arch = SupportedArchitecture(")
    names = run_block(code, Llama3Model=PipelineModel, convert_safetensor_state_dict=len, convert_gguf_state_dict=len)
    assert names["llama_arch"].default_encoding is SupportedEncoding.q4_k


@needs_page
def test_page_pipeline_model() -> None:
    names = run_block(page_block("class MyModel(PipelineModel)"))
    assert not names["MyModel"].__abstractmethods__


@needs_page
def test_page_config() -> None:
    assert run_block(page_block("# Model specification"))["config"].max_batch_size == 32


@needs_page
def test_page_custom_architecture(
    tmp_path: Path, custom_model_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The folder as printed (with a MyModel in model.py), loaded by the printed command and by the library."""
    folder = tmp_path / "my_model"
    folder.mkdir()
    (folder / "__init__.py").write_text(page_block("# my_model/__init__.py"))
    (folder / "arch.py").write_text(page_block("# my_model/arch.py"))
    (folder / "model.py").write_text(CUSTOM_MODEL)
    monkeypatch.chdir(tmp_path)
    command = re.search(r"^max serve (.*)$", PAGE.read_text(), re.MULTILINE)
    assert command is not None
    arguments = command[1].replace("path/to/weights", str(custom_model_path)).split()
    assert cli.main(["serve", *arguments, "--print-config"]) == 0
    assert re.search(r"^architecture +MyModelForCausalLM ", capsys.readouterr().out, re.MULTILINE)
    config = PipelineConfig(model_path=str(custom_model_path), custom_architectures=["./my_model"])
    tokenizer, pipeline = PIPELINE_REGISTRY.retrieve(config)
    assert len(generate(tokenizer, pipeline, "abc", 4)) == 4

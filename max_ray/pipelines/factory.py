"""From a plan to something that runs: the only place that builds models.

`build_factory` is what the registry calls; `build_runner` is what a worker calls, with its rank.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from logging import INFO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from max_ray.config import PipelineConfig
from max_ray.engine.process_memory import held_bytes, return_freed_memory
from max_ray.errors import ConfigError
from max_ray.images.limits import ImageLimits
from max_ray.interfaces import PipelineTask, Runner
from max_ray.kv_cache import PagedKVCacheManager
from max_ray.log import get_logger
from max_ray.modeling import PipelineModel
from max_ray.phases import phase
from max_ray.pipelines.embeddings import EmbeddingsPipeline
from max_ray.pipelines.text_generation import TextGenerationPipeline
from max_ray.pipelines.vocabulary import token_vocabulary
from max_ray.planning.checkpoint import open_checkpoint
from max_ray.planning.hardware import MIB
from max_ray.planning.plan import PipelinePlan, resolve_plan
from max_ray.registry import PIPELINE_REGISTRY
from max_ray.sentence_files import score_activation
from max_ray.structured_output import GrammarCompiler
from max_ray.tokenization.tokenizer import TextTokenizer

if TYPE_CHECKING:
    import torch

    from max_ray.distributed.group import TPGroup
    from max_ray.engine.device_memory import StepMemory
    from max_ray.engine.score_head import ScoreHead


_LOG = get_logger(__name__)


@dataclass(frozen=True)
class PipelineFactory:
    """Builds the planned pipeline in the process that calls it. Picklable: it holds the plan, not the model."""

    plan: PipelinePlan

    def __call__(self) -> TextGenerationPipeline | EmbeddingsPipeline:
        """Loads the weights and gives a pipeline whose executor runs in this process, on a thread a rank."""
        from max_ray.engine.local_executor import LocalExecutor

        runners = build_local_runners(self.plan)
        if self.plan.is_pooled:
            limits = (self.plan.max_batch_size, self.plan.config.max_batch_input_tokens)
            return EmbeddingsPipeline(LocalExecutor(runners), *limits)
        manager = PagedKVCacheManager(
            self.plan.kv_params, runners[0].num_blocks, enable_prefix_caching=self.plan.config.enable_prefix_caching
        )
        return TextGenerationPipeline(LocalExecutor(runners), manager)


def build_factory(
    config: PipelineConfig,
    task: PipelineTask | None = None,
    override_architecture: str | None = None,
) -> tuple[TextTokenizer, PipelineFactory]:
    """The tokenizer, and the factory of the pipeline, for a configuration. Raises ConfigError; loads no weights."""
    plan = resolve_plan(config, task=task, override_architecture=override_architecture)
    return build_tokenizer(plan), PipelineFactory(plan)


def build_tokenizer(plan: PipelinePlan) -> TextTokenizer:
    """The architecture's tokenizer over the plan's model folder."""
    kind: type[Any] | None = plan.stock_tokenizer
    options: dict[str, Any] = {}
    if kind is None:
        architecture = PIPELINE_REGISTRY.retrieve_architecture(plan.architecture, task=plan.task)
        kind, options["context_validators"] = architecture.tokenizer, architecture.context_validators
    if getattr(kind, "takes_images", False):
        options["image_limits"] = _image_limits(plan.config)
    if plan.config.allow_special_tokens_in_messages and plan.task is PipelineTask.TEXT_GENERATION:
        options["allow_special_tokens_in_messages"] = True
    tokenizer: TextTokenizer = kind(plan.model_dir, max_length=plan.max_length, **options)
    return tokenizer


def _image_limits(config: PipelineConfig) -> ImageLimits:
    root = config.allowed_image_root
    return ImageLimits(
        max_images=config.max_images,
        max_bytes=config.max_image_bytes,
        max_pixels=config.max_image_pixels,
        allowed_root=None if root is None else Path(root),
    )


def plan_device(plan: PipelinePlan) -> torch.device:
    """The torch device of a worker process, which sees its own GPU only."""
    import torch

    return torch.device("cuda", torch.cuda.current_device()) if plan.device == "cuda" else torch.device("cpu")


def rank_device(plan: PipelinePlan, rank: int) -> torch.device:
    """The torch device of a rank in this process: the CPU, or the GPU that `devices` names for it."""
    import torch

    if plan.device == "cpu":
        return torch.device("cpu")
    ids = plan.config.device_choice.ids or range(plan.tensor_parallel_size)
    return torch.device("cuda", ids[rank])


def build_local_runners(plan: PipelinePlan) -> list[Runner]:
    """All ranks of the plan in this process, loaded at the same time on a thread each."""
    import torch

    from max_ray.distributed.group import TPGroup, init_tp_group

    size = plan.tensor_parallel_size
    torch.set_num_threads(plan.num_threads)
    if size == 1:
        return [build_runner(plan, TPGroup.single(rank_device(plan, 0)), grammars_at_once=False)]
    with TemporaryDirectory(prefix="max_ray-") as folder, ThreadPoolExecutor(size) as threads:

        def build(rank: int) -> Runner:
            group = init_tp_group(rank, size, f"file://{folder}/meet", rank_device(plan, rank))
            return build_runner(plan, group, grammars_at_once=False)

        return list(threads.map(build, range(size)))


def build_runner(
    plan: PipelinePlan, tp: TPGroup, durations: dict[str, float] | None = None, *, grammars_at_once: bool = True
) -> Runner:
    """Loads one rank's shard and allocates its cache. Raises WeightsError and ConfigError.

    Args:
        durations: Gets the seconds of each phase.
        grammars_at_once: Whether the tokens for structured output are read meanwhile, in a thread (of a server), or
            with the first grammar.
    """
    PIPELINE_REGISTRY.register_packed(plan.custom_code)
    architecture = PIPELINE_REGISTRY.retrieve_architecture(plan.architecture, task=plan.task)
    return_freed_memory()
    before = _logged_bytes(tp.device)
    grammars = _grammars(plan, at_once=grammars_at_once) if tp.rank == 0 and not plan.is_pooled else None
    with phase("load", durations=durations):
        model = architecture.pipeline_model(
            plan.config,
            plan.huggingface_config,
            plan.encoding,
            tp.device,
            tp,
            open_checkpoint(Path(plan.model_dir), plan.weights_format, plan.huggingface_config, plan.encoding),
            architecture.weight_adapters.get(plan.weights_format),
        )
    with phase("compile", durations=durations):
        _pack(model)
    return_freed_memory()
    _log_weights(plan, before, _logged_bytes(tp.device))
    if plan.is_pooled:
        return _embeddings_runner(plan, model, tp)
    return _text_runner(plan, model, tp, durations, grammars)


def _embeddings_runner(plan: PipelinePlan, model: PipelineModel, tp: TPGroup) -> Runner:
    from max_ray.engine.embeddings_runner import EmbeddingsRunner
    from max_ray.engine.pooling_head import SentenceHead

    if plan.task is PipelineTask.SCORE:
        return EmbeddingsRunner(model, _score_head(plan, model, tp.device), tp)
    assert plan.sentence is not None, "the embeddings task knows how a vector is made"
    return EmbeddingsRunner(model, SentenceHead.load(plan.sentence, Path(plan.model_dir), tp.device), tp)


def _score_head(plan: PipelinePlan, model: PipelineModel, device: torch.device) -> ScoreHead:
    from max_ray.engine.score_head import ScoreHead

    folder = Path(plan.model_dir)
    source = open_checkpoint(folder, plan.weights_format, plan.huggingface_config, plan.encoding)
    layers = model.score_layers(plan.huggingface_config)

    def token_id(text: str) -> int:
        ids = build_tokenizer(plan).encode_text(text, False).tolist()
        if len(ids) != 1:
            raise ConfigError(f"This model's tokenizer makes {len(ids)} tokens of {text!r}, and a score needs one.")
        return int(ids[0])

    return ScoreHead.load(layers, source, score_activation(folder), token_id, device)


def _grammars(plan: PipelinePlan, *, at_once: bool) -> GrammarCompiler:
    """Reads the tokens for structured output in a thread: while the weights are loaded, or with the first grammar."""
    vocab_size = plan.huggingface_config.text_part.vocab_size
    return GrammarCompiler(lambda: token_vocabulary(build_tokenizer(plan), vocab_size), starts_at_once=at_once)


def _text_runner(
    plan: PipelinePlan,
    model: PipelineModel,
    tp: TPGroup,
    durations: dict[str, float] | None,
    grammars: GrammarCompiler | None,
) -> Runner:
    from max_ray.engine.graphs import decode_graphs
    from max_ray.engine.kv_storage import KVStorage
    from max_ray.engine.runner import ModelRunner

    vocab_size = plan.huggingface_config.text_part.vocab_size
    shape = (plan.max_batch_size, plan.max_length, plan.tensor_parallel_size)
    with phase("warm", durations=durations):
        needed = warm_up_on_gpu(plan, model, tp) if tp.device.type == "cuda" else None
        num_blocks = plan.num_blocks
        if num_blocks is None:
            assert needed is not None, "a CPU's cache is planned"
            num_blocks = _blocks_that_fit(plan, tp, needed)
        storage = KVStorage.allocate(plan.kv_params, num_blocks, tp.device)
        graphs = decode_graphs(model, storage, *shape, plan.config.cuda_graphs)
    return ModelRunner(model, storage, tp, vocab_size, graphs, grammars=grammars)


def warm_up_on_gpu(plan: PipelinePlan, model: PipelineModel, tp: TPGroup) -> StepMemory:
    """Compiles every kernel and measures a step and the decode graphs, over a small cache that is freed again."""
    from max_ray.engine.device_memory import CudaMemory, measure
    from max_ray.engine.graphs import decode_graphs
    from max_ray.engine.kv_storage import KVStorage
    from max_ray.engine.runner import ModelRunner
    from max_ray.engine.warm_up import WarmUp

    tokens = plan.config.max_batch_input_tokens
    storage = KVStorage.allocate(plan.kv_params, -(-tokens // plan.kv_params.page_size) + 1, tp.device)
    runner = ModelRunner(model, storage, tp, plan.huggingface_config.text_part.vocab_size)
    warm_up = WarmUp(model, storage, runner, plan.max_length, tokens)
    warm_up.compile_all()
    lazy = "never" if plan.config.cuda_graphs == "never" else "lazy"
    graphs = decode_graphs(model, storage, plan.max_batch_size, plan.max_length, plan.tensor_parallel_size, lazy)
    buckets = [] if graphs is None else graphs.buckets[::-1]

    def capture(number: int) -> None:
        assert graphs is not None
        graphs.capture(buckets[number])

    needed = measure(CudaMemory(tp.device), warm_up.largest_step, capture, len(buckets))
    _LOG.info("a step needs %.1f MiB, decode graphs %.1f MiB", needed.step / MIB, needed.graphs / MIB)
    return needed


def _pack(model: PipelineModel) -> None:
    """Packs the weights of the networks that a model holds, now that they are loaded."""
    from max_ray.nn import Module, pack_weights

    for network in vars(model).values():
        if isinstance(network, Module):
            pack_weights(network)


def _logged_bytes(device: torch.device) -> int | None:
    """`held_bytes` where the log shows it: the system counts all pages of the process, which takes milliseconds."""
    return held_bytes(device) if _LOG.isEnabledFor(INFO) else None


def _log_weights(plan: PipelinePlan, before: int | None, after: int | None) -> None:
    """Planned against measured. Ranks that are threads of one process are measured together."""
    if before is None or after is None:
        return
    _LOG.info(
        "weights of a rank: planned %.1f MiB, measured %.1f MiB; KV cache: planned %.1f MiB",
        plan.memory.weights / MIB,
        (after - before) / MIB,
        plan.memory.kv_cache / MIB,
    )


def _blocks_that_fit(plan: PipelinePlan, tp: TPGroup, needed: StepMemory) -> int:
    """Blocks for the device memory that is free now, keeping back what `device_memory_utilization` says and what is
    `needed` beside; the smallest answer of all ranks."""
    import torch

    from max_ray.distributed import all_reduce_min

    torch.cuda.empty_cache()  # what loading has given back counts as free
    free, total = torch.cuda.mem_get_info(tp.device)
    usable = needed.left_for_cache(free, total, plan.config.device_memory_utilization)
    fits = torch.tensor([usable // plan.kv_params.bytes_per_block], dtype=torch.int64, device=tp.device)
    num_blocks = int(all_reduce_min(fits, tp).item())
    longest = -(-plan.max_length // plan.kv_params.page_size)
    if num_blocks < longest:
        raise ConfigError(
            f"After loading, the device has room for {num_blocks * plan.kv_params.page_size} tokens of KV cache, and "
            f"one request of max_length={plan.max_length} needs {longest * plan.kv_params.page_size}. Set --max-length "
            f"{num_blocks * plan.kv_params.page_size}, or raise --tensor-parallel-size."
        )
    return min(num_blocks, longest * plan.max_batch_size)

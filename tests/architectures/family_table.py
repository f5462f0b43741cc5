"""Writes `architectures/FAMILIES.md`: `python -m tests.architectures.family_table` makes a tiny random checkpoint of
each family in `family_rows.py` under its published names, and says whether this library gives what `transformers` gives
in float32, or why it refuses. Takes about two minutes. Class names as arguments: only prints those."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import save_file
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from max_ray.config import PipelineConfig
from max_ray.errors import ConfigError
from max_ray.interfaces import PipelineTask
from max_ray.pipelines import resolve_plan
from tests.architectures.adapter_models import (
    make_adapter_checkpoint,
    randomize,
    tiny_adapter_config,
    tiny_config,
)
from tests.architectures.family_rows import ROWS, Row
from tests.architectures.greedy import NUM_GREEDY, reference_tokens, served_tokens
from tests.architectures.multimodal import (
    change_config,
    find_multimodal,
    make_multimodal,
    multimodal_config,
)
from tests.architectures.vision import DENSE, make_vision
from tests.byte_tokenizer import VOCAB_SIZE, write_byte_level
from tests.embeddings.checkpoints import Vectors, random_rows, write_sentence_files
from tests.embeddings.in_process import embed_in_process

FILE = Path(__file__).parents[2] / "architectures" / "FAMILIES.md"
MOST_REFUSED = 28
VECTOR_LIMIT = 1e-4
LENGTHS = [7, 3, 19]
HEAD = """# Families

Written by `python -m tests.architectures.family_table`; do not edit by hand. For each of the {total} families that are
used most: a tiny random checkpoint (`tests/architectures/family_rows.py`) under the class name and model_type of the
published ones, started as `max-ray serve` starts a model. Served: {greedy} greedy tokens (of an embedder, vectors to
{limit:g}) are those that `transformers` {version} gives in float32, by the family in the last column
(`TransformersForCausalLM`: the adapter). **{refused} of {total} are refused.** Of a multimodal family the text network
counts; tokenizers do not (Kimi K2 has DeepSeek V3's class, and a tokenizer that is refused).

| family | class in config.json | model_type | result | by, or why not |
|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Line:
    """A family's result ("served", "refused", "**wrong**"), and by which record or why not."""

    row: Row
    result: str
    by: str


def line_of(row: Row) -> Line:
    """Tries a family. Raises what is neither a result nor a refusal."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        can_be_made = _make(row, folder)
        try:
            by = resolve_plan(_config(folder)).architecture
        except ConfigError as error:
            return Line(row, "refused", _short(str(error)))
        if not can_be_made:
            return Line(row, "**wrong**", "it is not refused, and transformers cannot make a checkpoint of it")
        same = _same_vectors(row, folder) if row.kind == "embedder" else _same_tokens(row, folder)
        return Line(row, "served" if same else "**wrong**", f"`{by}`")


def _config(folder: Path) -> PipelineConfig:
    return PipelineConfig(model_path=str(folder), devices="cpu", num_threads=1, quantization_encoding="float32")


def _make(row: Row, folder: Path) -> bool:
    """Writes the checkpoint, or where `transformers` cannot make a tiny one, config.json and a file of weights that
    nobody reads. Returns which."""
    try:
        _MAKERS[row.kind](row, folder)
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, IndexError, AssertionError, ImportError):
        _names_only(row, folder)
        change_config(folder, **_values(row))
        return False
    change_config(folder, architectures=[row.class_name], model_type=row.model_type, **row.published)
    return row.kind != "names only"


def _values(row: Row) -> dict[str, Any]:
    config = (
        multimodal_config(find_multimodal(row.model_type))
        if row.kind == "multimodal"
        else tiny_adapter_config(row.native or row.class_name, **row.changes)
    )
    values = json.loads(config.to_json_string(use_diff=False))
    return {**values, "architectures": [row.class_name], "model_type": row.model_type, "dtype": None}


def _decoder(row: Row, folder: Path) -> None:
    make_adapter_checkpoint(row.native or row.class_name, folder, **row.changes)


def _multimodal(row: Row, folder: Path) -> None:
    make_multimodal(find_multimodal(row.model_type), folder)


def _vision(row: Row, folder: Path) -> None:
    make_vision(DENSE, folder)


def _names_only(row: Row, folder: Path) -> None:
    values = {"architectures": [row.class_name], "model_type": row.model_type, "auto_map": {"AutoModel": "m.Model"}}
    (folder / "config.json").write_text(json.dumps(values))
    save_file({"lm_head.weight": torch.zeros(2)}, folder / "model.safetensors", metadata={"format": "pt"})


def _embedder(row: Row, folder: Path) -> None:
    write_byte_level(folder)
    network_class = getattr(transformers, row.native or row.class_name)
    config = tiny_config(
        network_class.config_class, **{"vocab_size": VOCAB_SIZE + 3, "is_decoder": False, **row.changes}
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = network_class(config).float().eval()
        with torch.no_grad():
            for name, parameter in network.named_parameters():
                randomize(name, parameter)
    network.save_pretrained(folder)
    write_sentence_files(folder, pooling=row.pooling)


_MAKERS: dict[str, Callable[[Row, Path], None]] = {
    "decoder": _decoder,
    "multimodal": _multimodal,
    "vision": _vision,
    "embedder": _embedder,
    "names only": _names_only,
}


def _same_tokens(row: Row, folder: Path) -> bool:
    ours = served_tokens(folder)
    if row.kind == "decoder" and row.model_type not in CONFIG_MAPPING:
        with TemporaryDirectory() as native:
            return ours == reference_tokens(make_adapter_checkpoint(row.native, Path(native), **row.changes))
    if row.kind == "multimodal" and (model := find_multimodal(row.model_type)).tower_alone:
        with TemporaryDirectory() as text:
            return ours == reference_tokens(make_adapter_checkpoint(model.text_class, Path(text), **model.text))
    return ours == reference_tokens(folder)


def _same_vectors(row: Row, folder: Path) -> bool:
    assert resolve_plan(_config(folder)).task is PipelineTask.EMBEDDINGS_GENERATION
    rows = random_rows(LENGTHS)
    expected = _reference_vectors(row, folder, rows)
    return bool(np.abs(embed_in_process(folder, rows) - expected).max() < VECTOR_LIMIT)


def _reference_vectors(row: Row, folder: Path, rows: list[list[int]]) -> Vectors:
    network_class = getattr(transformers, row.native or row.class_name)
    kind = network_class.config_class
    config = kind.from_pretrained(folder, model_type=kind.model_type)  # not the published one, by which names are read
    network = network_class.from_pretrained(
        folder, config=config, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.inference_mode():
        hidden = [network(torch.tensor([ids])).last_hidden_state[0] for ids in rows]
    vectors = torch.stack([h[-1] if row.pooling == "lasttoken" else h.mean(0) for h in hidden])
    return np.asarray((vectors / vectors.norm(dim=-1, keepdim=True)).numpy())


def _short(text: str) -> str:
    """The reason without the list of what is known."""
    text = " ".join(text.split()).replace("|", "/").partition(" Known are: ")[0]
    return text if len(text) <= 200 else f"{text[:200]}.."


def table(lines: list[Line]) -> str:
    """The whole file."""
    refused = sum(line.result != "served" for line in lines)
    head = HEAD.format(
        total=len(lines), greedy=NUM_GREEDY, limit=VECTOR_LIMIT, version=transformers.__version__, refused=refused
    )
    ordered = sorted(lines, key=lambda line: line.result != "served")
    return head + "".join(
        f"| {line.row.name} | `{line.row.class_name}` | `{line.row.model_type}` | {line.result} | {line.by} |\n"
        for line in ordered
    )


def main(names: list[str]) -> int:
    """Exit status 1 where a family is served wrongly, or more are refused than MOST_REFUSED."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    lines = []
    for row in ROWS:
        if names and row.class_name not in names:
            continue
        lines.append(line_of(row))
        print(f"{lines[-1].result:9} {row.name} ({row.class_name}): {lines[-1].by}", flush=True)
    refused = sum(line.result != "served" for line in lines)
    print(f"{refused} of {len(lines)} refused")
    if not names:
        FILE.write_text(table(lines), encoding="utf-8")
    return int(any("wrong" in line.result for line in lines) or refused > MOST_REFUSED)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Custom architectures: import, pack, travel, install. Every mistake is one sentence."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from max_ray import custom_code
from max_ray.custom_code import PackedCode, import_architectures, install_packed, pack_architectures
from max_ray.errors import ConfigError
from max_ray.pipelines import PIPELINE_REGISTRY

INIT = "from .arch import my_arch\n\nARCHITECTURES = [my_arch]\n"
ARCH = """
from max_ray.interfaces import PipelineTask
from max_ray.modeling import PipelineModel
from max_ray.pipelines.lib import SupportedArchitecture, SupportedEncoding

class MyModel(PipelineModel):
    pass

my_arch = SupportedArchitecture(
    name="{name}",
    task=PipelineTask.TEXT_GENERATION,
    default_encoding=SupportedEncoding.float32,
    supported_encodings={{SupportedEncoding.float32}},
    pipeline_model=MyModel,
    tokenizer=object,
)
"""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("MAX_RAY_CACHE_DIR", str(tmp_path / "cache"))
    yield
    PIPELINE_REGISTRY.reset()


def make_folder(folder: Path, name: str = "MyModelForCausalLM", **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for file, text in {"__init__": INIT, "arch": ARCH.format(name=name), **files}.items():
        (folder / f"{file}.py").write_text(text)
    return folder


def test_a_folder_is_imported_once(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "my_model")
    (found,) = import_architectures(str(folder))
    assert found.name == "MyModelForCausalLM"
    assert import_architectures(str(folder)) == [found]


def test_relative_spec_and_folder_with_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path / "models" / "my_model")
    monkeypatch.chdir(tmp_path)
    (one,) = import_architectures("./models/my_model")
    assert import_architectures("models:my_model") == import_architectures("./models/my_model/") == [one]


def test_installed_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folder(tmp_path / "installed_family", __init__=INIT + "OTHERS = [my_arch]\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir("/")
    (one,) = import_architectures("installed_family")
    assert import_architectures("installed_family:OTHERS") == [one]
    (packed,) = pack_architectures(["installed_family:OTHERS"])
    assert packed == PackedCode("installed_family", attribute="OTHERS")
    assert install_packed([packed]) == [one]


def test_two_folders_of_one_name_do_not_collide(tmp_path: Path) -> None:
    one = make_folder(tmp_path / "a" / "my_model", "One")
    two = make_folder(tmp_path / "b" / "my_model", "Two")
    assert [import_architectures(str(folder))[0].name for folder in (one, two)] == ["One", "Two"]
    names = [record.name for record in install_packed(pack_architectures([str(one), str(two)]))]
    assert names == ["One", "Two"]


def test_a_folder_named_like_an_installed_module(tmp_path: Path) -> None:
    (found,) = import_architectures(str(make_folder(tmp_path / "json", "Json")))
    assert found.name == "Json"
    import json

    assert json.loads("1") == 1


def test_changed_code_is_imported_anew(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "my_model", "Before")
    assert import_architectures(str(folder))[0].name == "Before"
    make_folder(folder, "After")
    assert import_architectures(str(folder))[0].name == "After"


def test_registering_overrides_a_built_in_family(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "my_model", "LlamaForCausalLM")
    (own,) = PIPELINE_REGISTRY.register_custom([str(folder)])
    assert PIPELINE_REGISTRY.retrieve_architecture("LlamaForCausalLM") is own


def test_two_folders_with_one_family_are_refused(tmp_path: Path) -> None:
    one, two = (str(make_folder(tmp_path / name / "my_model", "Mine", other=f"{name} = 1\n")) for name in "ab")
    with pytest.raises(ConfigError, match=f"{one} and {two} both bring Mine: drop one"):
        PIPELINE_REGISTRY.register_custom([one, two])
    assert "Mine" not in PIPELINE_REGISTRY.architecture_names()
    assert len(PIPELINE_REGISTRY.register_custom([one, one + "/"])) == 1


def test_packing_runs_nothing_and_leaves_out_what_is_no_code(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "my_model", __init__="raise SystemExit('the code ran')\n")
    kernels = folder / "kernels"
    for junk in (folder / "__pycache__", folder / ".git", kernels):
        junk.mkdir()
        (junk / "file").write_text(str(junk))
    (folder / "old.pyc").write_bytes(b"x")
    (packed,) = pack_architectures([str(folder)])
    with zipfile.ZipFile(io.BytesIO(packed.archive)) as archive:
        assert sorted(archive.namelist()) == ["__init__.py", "arch.py", "kernels/file"]
    assert packed == pack_architectures([str(folder)])[0]
    (kernels / "file").write_text("changed")
    assert pack_architectures([str(folder)])[0].digest != packed.digest


def test_the_digest_tells_names_from_contents() -> None:
    digests = {
        custom_code._digest(files)
        for files in ([("a", b"bc")], [("ab", b"c")], [("a", b"b"), ("c", b"")], [("a", b""), ("b", b"c")], [])
    }
    assert len(digests) == 5


def test_sixteen_mebibytes_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_folder(tmp_path / "my_model")
    size = sum(file.stat().st_size for file in folder.iterdir())
    monkeypatch.setattr(custom_code, "MAX_BYTES", size)
    assert pack_architectures([str(folder)])
    monkeypatch.setattr(custom_code, "MAX_BYTES", size - 1)
    with pytest.raises(ConfigError, match="keep weights and data elsewhere"):
        pack_architectures([str(folder)])


def test_a_class_pickled_here_is_found_in_another_process(tmp_path: Path) -> None:
    """What a worker does: install the bytes, then unpickle; the original folder is gone by then."""
    folder = make_folder(tmp_path / "my_model")
    (found,) = import_architectures(str(folder))
    message = pickle.dumps((pack_architectures([str(folder)]), pickle.dumps(found.pipeline_model)))
    (tmp_path / "message").write_bytes(message)
    folder.rename(tmp_path / "moved")
    code = (
        "import pickle, sys\n"
        "packed, model = pickle.load(open(sys.argv[1], 'rb'))\n"
        "from max_ray.registry import PIPELINE_REGISTRY\n"
        "(record,) = PIPELINE_REGISTRY.register_packed(packed)\n"
        "assert pickle.loads(model) is record.pipeline_model\n"
        "assert PIPELINE_REGISTRY.retrieve_architecture('MyModelForCausalLM') is record\n"
        "assert 'torch' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "message")], check=True)


def test_installing_twice_writes_once(tmp_path: Path) -> None:
    packed = pack_architectures([str(make_folder(tmp_path / "my_model"))])
    install_packed(packed)
    (unpacked,) = (tmp_path / "cache" / "custom_architectures").iterdir()
    before = unpacked.stat().st_mtime_ns
    install_packed(packed)
    assert unpacked.stat().st_mtime_ns == before
    assert (tmp_path / "cache" / "custom_architectures").stat().st_mode & 0o077 == 0


def test_a_tampered_cache_is_written_again(tmp_path: Path) -> None:
    packed = pack_architectures([str(make_folder(tmp_path / "my_model"))])
    folder = custom_code._unpack(packed[0])
    (folder / "arch.py").write_text("raise SystemExit('tampered')")
    assert custom_code._unpack(packed[0]) == folder
    assert (folder / "arch.py").read_text() == ARCH.format(name="MyModelForCausalLM")


def test_many_workers_unpack_at_once(tmp_path: Path) -> None:
    (packed,) = pack_architectures([str(make_folder(tmp_path / "my_model"))])
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(custom_code._unpack(packed))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert set(found) == set((tmp_path / "cache" / "custom_architectures").iterdir())


def test_damaged_bytes_are_refused(tmp_path: Path) -> None:
    (packed,) = pack_architectures([str(make_folder(tmp_path / "my_model"))])
    (other,) = pack_architectures([str(make_folder(tmp_path / "other", "Other"))])
    with pytest.raises(ConfigError, match="arrived damaged"):
        install_packed([PackedCode(packed.name, packed.digest, other.archive)])
    assert list((tmp_path / "cache" / "custom_architectures").iterdir()) == []


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"__init__": "x = 1\n"}, "has no list ARCHITECTURES"),
        ({"__init__": "ARCHITECTURES = ['x']\n"}, "must be a list of SupportedArchitecture records"),
        ({"arch": "\n\nimport no_such_module\n"}, r"No module named 'no_such_module' \(.*arch.py, line 3\)"),
        ({"arch": "my_arch = (\n"}, r"SyntaxError: .*\(.*arch.py, line 1\)"),
        ({"arch": "\nmy_arch = 1 / 0\n"}, r"ZeroDivisionError: division by zero \(.*arch.py, line 2\)"),
        ({"arch": "def f():\n    raise KeyError('k')\nf()\n"}, r"KeyError: 'k' \(.*arch.py, line 2\)"),
        (
            {"__init__": "from my_model.arch import my_arch\n"},
            r"imports its own modules relatively: from \.arch import",
        ),
    ],
)
def test_code_that_cannot_be_used(tmp_path: Path, files: dict[str, str], message: str) -> None:
    folder = make_folder(tmp_path / "my_model", **files)
    before = set(sys.modules)
    with pytest.raises(ConfigError, match=message) as caught:
        import_architectures(str(folder))
    assert str(caught.value).startswith(f"The custom architecture {folder}")
    if "__init__" not in files:
        assert set(sys.modules) == before
        make_folder(folder)
        assert import_architectures(str(folder))


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("1 / 0\n", r"ZeroDivisionError: .* \(.*my_module.py, line 1\)"),
        ("x = (\n", r"SyntaxError: .*my_module.py, line 1"),
    ],
)
def test_an_installed_module_that_cannot_be_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, message: str
) -> None:
    (tmp_path / "my_module.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match=f"The custom architecture my_module cannot be imported: {message}"):
        import_architectures("my_module")


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    file = make_folder(tmp_path / "my_model") / "arch.py"
    with pytest.raises(ConfigError, match="is a file: give the folder that it is in"):
        import_architectures(str(file))


def test_specs_that_name_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match=r"has no __init__.py"):
        import_architectures(str(tmp_path / "empty"))
    for spec in ("./no_such_folder", "no_such_module", "no_such.module:NAME", "json:x:y/z", ""):
        with pytest.raises(ConfigError, match="custom architecture"):
            import_architectures(spec)

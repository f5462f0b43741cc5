"""A stand-in for `max-ray serve`: the fake engine on `--port`, until SIGTERM.

python -m tests.cli.fake_serve --port PORT --model-path DIR
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import uvicorn

from max_ray.serve.api.routes import build_api
from max_ray.tokenization.tokenizer import TextTokenizer
from tests.http.fake_engine import FakeEngine


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=int)
    parser.add_argument("--model-path")
    given, _ = parser.parse_known_args()
    Path(given.model_path, "started").write_text("\n".join(sys.argv[1:]))
    engine = FakeEngine(TextTokenizer(Path(given.model_path), max_length=200), lambda context: "hello")
    engine.model_name = Path(given.model_path).name
    uvicorn.run(build_api(engine), host="127.0.0.1", port=given.port, log_level="warning", lifespan="off")


if __name__ == "__main__":
    main()

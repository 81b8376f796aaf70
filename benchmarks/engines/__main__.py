"""One engine in its own process: ``python -m engines '{"engine": "llama_cpp", ...}'``.

Its only argument is JSON settings. It answers each line on stdin, such as ``{"batch": 8}``, with a
line of JSON. With ``"convert": true`` it makes the engine's own files and ends.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from pathlib import Path

import numpy as np

from engines import PROMPT, VOCABULARY


def main() -> None:
    settings = json.loads(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keep the output of libraries out of the answers
    engine = importlib.import_module(f"engines.{settings['engine']}")
    if settings.get("convert"):
        engine.convert(Path(settings["exported"]), Path(settings["model"]), settings)
        return
    run = engine.make(settings)
    dice = np.random.default_rng(0)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        prompts = dice.integers(0, VOCABULARY - 1, (json.loads(line)["batch"], PROMPT))
        print(json.dumps(run(prompts)), file=answers, flush=True)


if __name__ == "__main__":
    main()

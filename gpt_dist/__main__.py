"""List the commands: ``python -m gpt_dist``."""

from __future__ import annotations

import difflib
import sys

from gpt_dist.errors import UsageError, run_main

COMMANDS = {
    "gpt_dist.prepare": "turn text into token shards",
    "gpt_dist.train": "train a model, or resume its training",
    "gpt_dist.generate": "continue a prompt with a trained model",
    "gpt_dist.evaluate": "score a model: HellaSwag, LAMBADA, perplexity",
    "gpt_dist.plot": "draw the loss curves of runs",
    "gpt_dist.export": "export a model to Hugging Face's or llm.c's format",
    "gpt_dist.import_hf": "import a pretrained GPT-2",
    "gpt_dist.kernels": "build the CPU kernels now",
    "serve": "serve a model over gRPC",
    "serve.client": "call a server",
    "serve.probe": "ask whether this container's server is healthy",
    "serve.bench": "measure a server under load",
    "serve.playground": "try a model in the browser",
}


def main() -> None:
    """Print the commands.

    Raises:
        UsageError: something follows, such as the name of a command.
    """
    if sys.argv[1:] and sys.argv[1] not in ("-h", "--help"):
        word = sys.argv[1]
        names = {name.rpartition(".")[2]: name for name in COMMANDS}
        close = difflib.get_close_matches(word, names, n=1)
        hint = f"run python -m {names[close[0]]}" if close else "python -m gpt_dist lists them"
        raise UsageError(f"gpt_dist {word}: commands are modules of their own; {hint}")
    print("commands; each has --help:")
    for name, what in COMMANDS.items():
        print(f"  python -m {name:<20}{what}")


if __name__ == "__main__":
    run_main(main)

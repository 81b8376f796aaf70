"""``python -m serve.client``: the command line client."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.json_format import MessageToDict

from gpt_dist.errors import Parser, UsageError, at_least, run_main
from gpt_dist.v1 import generation_pb2 as pb
from serve.client import Client
from serve.client.connection import DEFAULT_TARGET, DEFAULT_TIMEOUT
from serve.client.requests import CONFIG, OWN
from serve.client.words import ending, failure_of

TYPES: dict[int, Callable[[str], Any]] = {
    FieldDescriptor.TYPE_FLOAT: float,
    FieldDescriptor.TYPE_UINT32: at_least(0, int, (1 << 32) - 1),
    FieldDescriptor.TYPE_UINT64: at_least(0, int, (1 << 64) - 1),
}
TOKEN_ID = TYPES[FieldDescriptor.TYPE_UINT32]
CONNECTION = (
    "target", "timeout", "request_id", "token", "token_file",
    "tls", "tls_ca", "tls_cert", "tls_key", "model",
)  # fmt: skip
"""Flags that are arguments of `Client`."""
HELP = {
    "temperature": "divides the logits; 0 is greedy; default 1",
    "top_k": "keep the k most likely tokens",
    "top_p": "keep the most likely tokens up to this total probability",
    "min_p": "keep tokens at least this likely, relative to the most likely one",
    "repetition_penalty": "values above 1 discourage repetition",
    "presence_penalty": "subtracted from the logits of tokens already generated",
    "frequency_penalty": "subtracted once for each time a token was generated",
    "seed": "makes sampling reproducible",
    "n": "number of continuations",
    "max_new_tokens": "maximum number of tokens; default 128",
    "min_new_tokens": "minimum number of tokens",
    "ignore_eos": "continue after the end-of-text token",
    "include_stop_sequence": "keep the stop sequence in the text",
    "logprobs": "report log-probabilities (with --json)",
    "top_logprobs": "report the N most likely tokens as well",
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = Parser(
        prog="python -m serve.client",
        description="Call a server that runs `python -m serve`.",
        epilog="""examples:
  python -m serve.client generate "Once upon a time" --stream
  python -m serve.client generate "Once upon a time" -n 4 --seed 1 --json
  echo "To be, or not to be" | python -m serve.client score
  python -m serve.client health && echo up""",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    shared = Parser(add_help=False)
    connection = shared.add_argument_group("connection")
    connection.add_argument("--target", default=DEFAULT_TARGET, help="default %(default)s")
    connection.add_argument(
        "--timeout", type=at_least(0.001, float), default=DEFAULT_TIMEOUT, metavar="SECONDS",
        help="deadline, default %(default)g",
    )  # fmt: skip
    connection.add_argument("--token", help="bearer token (GPT_DIST_TOKEN)")
    connection.add_argument("--tls", action="store_true", help="encrypt")
    for name, text in (
        ("token-file", "file with the bearer token, which --token shows to other users"),
        ("tls-ca", "certificate authorities to trust (PEM)"),
        ("tls-cert", "certificate of this client (PEM)"),
        ("tls-key", "its private key (PEM)"),
    ):
        connection.add_argument(f"--{name}", type=Path, metavar="FILE", help=text)
    connection.add_argument("--request-id", help="sent to the server's log")
    connection.add_argument(
        "--model", default="", metavar="NAME", help="fail if the server serves another model"
    )
    shared.add_argument("--json", action="store_true", help="print messages as JSON lines")

    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=text, description=text, parents=[shared])

    generate = command("generate", "Continue a prompt.")
    generate.add_argument("prompt", nargs="?", help="text; default: stdin")
    generate.add_argument("--stream", action="store_true", help="print text as it arrives")
    _parameters(generate.add_argument_group("parameters"))
    score = command("score", "Print the log-probabilities of a text.")
    score.add_argument("prompt", nargs="?", help="text; default: stdin")
    score.add_argument("--top-logprobs", type=TOKEN_ID, default=0, metavar="N")
    score.add_argument("--prepend-end-of-text", action="store_true")
    tokenize = command("tokenize", "Convert a text to token ids.")
    tokenize.add_argument("prompt", nargs="?", help="text; default: stdin")
    detokenize = command("detokenize", "Convert token ids to text.")
    detokenize.add_argument("ids", nargs="+", type=TOKEN_ID, metavar="ID")
    command("info", "Describe the served model.")
    command("status", "Tell how busy the server is.")
    command("health", "Exit with status 0 if the server accepts requests, else 1.")
    return made


def _parameters(group: Any) -> None:
    """Add a flag for every field of the request's parts."""
    for message in (pb.SamplingParams, pb.StoppingCriteria, pb.OutputOptions):
        for field in message.DESCRIPTOR.fields:
            flag = f"--{field.name.replace('_', '-')}"
            names = ("-n", "--n") if field.name == "n" else (flag,)
            if field.type == FieldDescriptor.TYPE_BOOL:
                group.add_argument(flag, action="store_true", help=HELP[field.name])
            elif field.name in HELP:
                group.add_argument(
                    *names, type=TYPES[field.type], help=HELP[field.name], metavar="X"
                )
    group.add_argument(
        "--logit-bias",
        action="append",
        metavar="ID=X",
        help="add X to the logit of a token; repeatable",
    )
    group.add_argument("--stop", action="append", metavar="TEXT", help="stop sequence; repeatable")
    group.add_argument(
        "--stop-token-ids", type=TOKEN_ID, nargs="+", metavar="ID", help="tokens that end the text"
    )
    group.add_argument(
        "--truncate-prompt-tokens",
        type=TOKEN_ID,
        metavar="N",
        help="keep only the last N tokens of a longer prompt",
    )
    group.add_argument(
        "--expected-weights-version",
        metavar="VERSION",
        help="fail if the server has other weights",
    )
    group.add_argument(
        "--cache-salt",
        metavar="TEXT",
        help="share cached prefixes only with requests that have the same salt",
    )
    group.add_argument(
        "--priority",
        type=int,
        metavar="N",
        help="of your waiting requests lower ones go first; -10 to 10, default 0",
    )
    group.add_argument(
        "--time-budget",
        type=float,
        metavar="SECONDS",
        help="return what was generated within this time",
    )


def _chosen(arguments: argparse.Namespace) -> dict[str, Any]:
    names = {*HELP, "stop_token_ids", "time_budget", *OWN[1:], *CONFIG}
    chosen = {name: getattr(arguments, name) for name in names}
    chosen["stop_sequences"] = arguments.stop
    if arguments.logit_bias:
        try:
            pairs = (item.split("=") for item in arguments.logit_bias)
            chosen["logit_bias"] = {int(token): float(bias) for token, bias in pairs}
        except ValueError:
            raise UsageError("--logit-bias: must be ID=X, such as 198=-5") from None
    # Keep 0, which is a value. False is a flag that was not given.
    return {
        name: value for name, value in chosen.items() if value is not None and value is not False
    }


def _prompt(arguments: argparse.Namespace) -> str:
    if arguments.prompt is not None:
        return str(arguments.prompt)
    if sys.stdin.isatty():
        raise UsageError("no prompt: give one as an argument or on stdin")
    return sys.stdin.read()


def _print_json(message: Any) -> None:
    # Unlike MessageToJson: one line, and no escapes for non-ASCII characters.
    content = MessageToDict(message, preserving_proto_field_name=True)
    print(json.dumps(content, ensure_ascii=False), flush=True)


def _generate(client: Client, arguments: argparse.Namespace) -> None:
    prompt, chosen = _prompt(arguments), _chosen(arguments)
    many = chosen.get("n", 1) > 1
    ends: list[tuple[int, Any, int]] = []  # index, finish, tokens
    if not arguments.stream:
        response = client.generate(prompt, **chosen)
        if arguments.json:
            _print_json(response)
            return
        for output in response.outputs:
            print((f"[{output.index}] " if many else "") + output.text)
            ends.append((output.index, output, len(output.token_ids)))
    else:
        line = None  # the output that the current line belongs to
        for piece in client.stream(prompt, **chosen):
            if arguments.json:
                _print_json(piece)
                continue
            if piece.text_delta:
                if many and piece.index != line:
                    print(f"{'' if line is None else chr(10)}[{piece.index}] ", end="")
                line = piece.index
                print(piece.text_delta, end="", flush=True)
            if piece.HasField("finished"):
                done = piece.finished
                ends.append((piece.index, done, done.usage.completion_tokens))
        if arguments.json:
            return
        print(flush=True)
    full = any(end.finish_reason == pb.FINISH_REASON_CONTEXT_FULL for _, end, _ in ends)
    context = client.info().max_context if full else 0
    for index, end, tokens in ends:
        mark = f"[{index}] " if many else ""
        print(f"{mark}ended: {ending(end, tokens, context)}", file=sys.stderr)


def _score(client: Client, arguments: argparse.Namespace) -> None:
    response = client.score(
        _prompt(arguments),
        top_logprobs=arguments.top_logprobs,
        prepend_end_of_text=arguments.prepend_end_of_text,
    )
    if arguments.json:
        _print_json(response)
        return
    for token in response.tokens:
        value = f"{token.logprob:9.4f}" if token.HasField("logprob") else " " * 9
        best = " ".join(f"{_show(other.token)}:{other.logprob:.2f}" for other in token.top)
        print(f"{value}  {_show(token.token)}  {best}".rstrip())
    print(f"{response.total_logprob:9.4f}  sum of {response.scored_tokens}")


def _show(token: bytes) -> str:
    return repr(token.decode(errors="backslashreplace"))


def _run(arguments: argparse.Namespace) -> int:
    with Client(**{name: getattr(arguments, name) for name in CONNECTION}) as client:
        match arguments.command:
            case "generate":
                _generate(client, arguments)
            case "score":
                _score(client, arguments)
            case "tokenize":
                ids = client.tokenize(_prompt(arguments))
                print(json.dumps(ids) if arguments.json else " ".join(map(str, ids)))
            case "detokenize":
                text = client.detokenize(arguments.ids)
                print(json.dumps(text, ensure_ascii=False) if arguments.json else text)
            case "info" | "status":
                message = client.info() if arguments.command == "info" else client.status()
                if arguments.json:
                    _print_json(message)
                else:
                    print(str(message).rstrip())
            case "health":
                serving = client.health(reachable=True)
                print(json.dumps(serving) if arguments.json else
                      "SERVING" if serving else "NOT_SERVING")  # fmt: skip
                return 0 if serving else 1
    return 0


def main(argv: list[str] | None = None) -> int:
    """Make the call. A failure becomes one line; Ctrl-C also cancels on the server.

    Raises:
        UsageError: a wrong flag, or a request that the server calls invalid.
        GptDistError: the call failed otherwise.
    """
    arguments = parser().parse_args(argv)
    # A shell may start background commands with SIGINT ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return _run(arguments)
    except grpc.RpcError as error:
        raise failure_of(error, arguments) from None
    except (TypeError, ValueError) as error:
        raise UsageError(str(error)) from None


if __name__ == "__main__":
    run_main(main)

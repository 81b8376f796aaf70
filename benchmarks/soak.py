"""Run the long versions of the server's tests, and record how many calls they made.

    python benchmarks/soak.py --json benchmarks/results/soak.json    # about half an hour

10,000 calls are abandoned at random moments and 100,000 malformed requests sent over each protocol,
and 10,000 jobs in each of five ways pass through the scheduler. Each test runs in a process of its
own, in which the server and its clients share the memory that is measured.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from flags import benchmark_parser
from record import record

from gpt_dist.errors import GptDistError, run_main

ROOT = Path(__file__).resolve().parents[1]
TESTS = (
    "test_cancel.py::test_interrupted_calls_leave_nothing",
    "http/test_leaving.py::test_interrupted_calls_leave_nothing",
    "test_fuzz.py::test_malformed_messages_never_cause_internal_errors",
    "http/test_fuzz.py::test_malformed_bodies_never_cause_internal_errors",
    "http/test_fuzz.py::test_described_requests_never_cause_internal_errors",
    "engine/test_ticks.py::test_random_sequences_get_the_stream_of_an_undisturbed_server",
    "test_server.py::test_overload",
)


def main() -> int:
    parser = benchmark_parser(__file__, __doc__)
    parser.add_argument("--json", metavar="FILE", help="write the record to this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "lines.jsonl"
        environment = os.environ | {"SOAK": "1", "SOAK_JSON": str(lines)}
        for test in TESTS:
            command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
            done = subprocess.run([*command, f"tests/serve/{test}"], cwd=ROOT, env=environment)
            if done.returncode:
                raise GptDistError(f"{test} failed; nothing is recorded")
        storms = [json.loads(line) for line in lines.read_text().splitlines()]
    record(arguments.json, {"storms": storms}, ("grpcio", "uvicorn"))
    return 0


if __name__ == "__main__":
    run_main(main)

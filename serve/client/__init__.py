"""Clients of ``python -m serve``, for Python programs; they need grpcio and protobuf only.

    with Client("127.0.0.1:50051") as client:
        print(client.generate("Once upon a time", temperature=0).outputs[0].text)
        for piece in client.stream("Once upon a time", n=2, seed=1):
            print(piece.index, piece.text_delta)

    async with AsyncClient("127.0.0.1:50051") as client:
        response = await client.generate("Once upon a time")

``python -m serve.client --help`` is the command line. Both clients have the same methods; results
are the messages of ``gpt_dist.v1``.
"""

from serve.client.asynchronous import AsyncClient
from serve.client.requests import Prompt, build_request
from serve.client.synchronous import Client

__all__ = ["AsyncClient", "Client", "Prompt", "build_request"]

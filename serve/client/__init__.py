"""Python clients of ``python -m serve``. They need grpcio and protobuf only.

    with Client("127.0.0.1:50051") as client:
        print(client.generate("Once upon a time", temperature=0).outputs[0].text)
        for piece in client.stream("Once upon a time", n=2, seed=1):
            print(piece.index, piece.text_delta)

    async with AsyncClient("127.0.0.1:50051") as client:
        response = await client.generate("Once upon a time")

Both clients have the same methods and return the messages of ``gpt_dist.v1``.
``python -m serve.client`` is the command line.
"""

from serve.client.asynchronous import AsyncClient
from serve.client.requests import Prompt, build_request
from serve.client.synchronous import Client

__all__ = ["AsyncClient", "Client", "Prompt", "build_request"]

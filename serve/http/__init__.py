"""HTTP as OpenAI's clients expect it, on the same scheduler as gRPC.

    /v1/completions · /v1/models · /tokenize · /detokenize · /health · /metrics · /openapi.json

The endpoints turn JSON into messages of ``gpt_dist.v1``, hand them to `serve.api.serving.Serving`,
and turn its answers into JSON.
"""

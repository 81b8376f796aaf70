"""The description of the endpoints for programs (OpenAPI 3.1)."""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import models_json_schema

from serve.api.served import server_version
from serve.http import schema

ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": "string"},
            },
        }
    },
}
ERRORS = {
    "400": "A field is invalid.",
    "401": "The token is missing or not valid.",
    "404": "There is no such path, or the server does not serve this model.",
    "408": "The body did not arrive in time.",
    "412": "The weights are not those that the request expects.",
    "413": "The body is too large.",
    "429": "The queue or a limit of the caller is full; Retry-After says when to try again.",
    "500": "A defect of the server, or the engine failed; do not repeat the request.",
    "503": "The model is loading, or the server is shutting down; the request had no effect.",
}


def _operation(
    summary: str, answer: str = "application/json", body: str = "", open_to_all: bool = False
) -> dict[str, Any]:
    reference = {"$ref": "#/components/schemas/Error"}
    found: dict[str, Any] = {
        "summary": summary,
        "responses": {
            "200": {"description": "The answer.", "content": {answer: {}}},
            **{
                status: {
                    "description": text,
                    "content": {"application/json": {"schema": reference}},
                }
                for status, text in ERRORS.items()
            },
        },
    }
    if body:
        content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{body}"}}}
        found["requestBody"] = {"required": True, "content": content}
    if open_to_all:
        found["security"] = []
        found["responses"]["503"] = {"description": "Not serving.", "content": {answer: {}}}
    return found


def openapi() -> dict[str, Any]:
    """The description."""
    bodies = (schema.CompletionRequest, schema.TokenizeRequest, schema.DetokenizeRequest)
    _, made = models_json_schema(
        [(body, "validation") for body in bodies], ref_template="#/components/schemas/{model}"
    )
    name = {"name": "model", "in": "path", "required": True, "schema": {"type": "string"}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "gpt_dist", "version": server_version()},
        "security": [{"token": []}],
        "paths": {
            "/v1/completions": {
                "post": _operation("Continue prompts.", body="CompletionRequest"),
            },
            "/v1/models": {"get": _operation("List the served model.")},
            "/v1/models/{model}": {
                "parameters": [name],
                "get": _operation("Describe the served model."),
            },
            "/tokenize": {"post": _operation("Text to token ids.", body="TokenizeRequest")},
            "/detokenize": {"post": _operation("Token ids to text.", body="DetokenizeRequest")},
            "/health": {
                "get": _operation("Whether requests are accepted.", open_to_all=True),
            },
            "/metrics": {"get": _operation("Metrics for Prometheus.", answer="text/plain")},
            "/openapi.json": {"get": _operation("This description.")},
        },
        "components": {
            "schemas": {**made["$defs"], "Error": ERROR},
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    }

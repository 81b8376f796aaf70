"""grpc.health.v1.

The servicer of grpcio-health-checking 1.81 is not used: when one watcher of a service leaves, it
drops the others too, and one slow watcher delays the rest.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
from grpc_health.v1 import health_pb2

from serve.api.status import StatusError

OVERALL = ""
"""The name that stands for the whole server."""
Status = health_pb2.HealthCheckResponse


class Health:
    """Implements ``grpc.health.v1.Health``. All services have the same state.

    Args:
        services: their full names; the empty name, for the whole server, is added.
    """

    def __init__(self, services: list[str]) -> None:
        self.services = {OVERALL, *services}
        self.serving = False
        self._changed = asyncio.Event()

    def set(self, serving: bool) -> None:
        """Change the state and notify all watchers."""
        if serving != self.serving:
            self.serving = serving
            self._changed.set()
            self._changed = asyncio.Event()

    def _status(self, service: str) -> Any:
        if service not in self.services:
            return Status.SERVICE_UNKNOWN
        return Status.SERVING if self.serving else Status.NOT_SERVING

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Any) -> Any:
        if request.service not in self.services:
            raise StatusError(grpc.StatusCode.NOT_FOUND, "unknown service", "UNKNOWN_SERVICE")
        return Status(status=self._status(request.service))

    async def Watch(
        self, request: health_pb2.HealthCheckRequest, context: Any
    ) -> AsyncIterator[Any]:
        last = None
        while True:
            changed = self._changed
            status = self._status(request.service)
            if status != last:
                last = status
                yield Status(status=status)
            else:
                await changed.wait()

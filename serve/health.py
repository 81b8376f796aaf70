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

from serve.api.status import StatusError, unavailable

OVERALL = ""
"""The name that stands for the whole server."""
WATCH = "gpt_dist.watch"
"""With ``--watch``: the name whose state is whether the newest checkpoint could be loaded."""
Status = health_pb2.HealthCheckResponse


class Health:
    """Implements ``grpc.health.v1.Health``. All services have the same state.

    Args:
        services: their full names; the empty name, for the whole server, is added.
    """

    def __init__(self, services: list[str]) -> None:
        self.services = {OVERALL, *services}
        self._states = dict.fromkeys(self.services, False)
        self._changed = asyncio.Event()
        self._closed = False

    @property
    def serving(self) -> bool:
        """The state of the whole server."""
        return self._states[OVERALL]

    def set(self, serving: bool) -> None:
        """Change the state of all services, and notify all watchers."""
        self._update(dict.fromkeys(self.services, serving))

    def set_one(self, name: str, serving: bool) -> None:
        """Change the state of a single name."""
        self._update({name: serving})

    def close(self) -> None:
        """End the calls of all watchers."""
        self._closed = True
        self._changed.set()

    def _update(self, states: dict[str, bool]) -> None:
        if any(self._states.get(name) != state for name, state in states.items()):
            self._states.update(states)
            self._changed.set()
            self._changed = asyncio.Event()

    def _status(self, name: str) -> Any:
        if name not in self._states:
            return Status.SERVICE_UNKNOWN
        return Status.SERVING if self._states[name] else Status.NOT_SERVING

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Any) -> Any:
        if request.service not in self._states:
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
            elif self._closed:
                raise unavailable("the server is shutting down", "DRAINING")
            else:
                await changed.wait()

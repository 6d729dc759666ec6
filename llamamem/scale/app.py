"""The Ray Serve application: `serve deploy configs/ray-serve.yaml`, or `llamamem scale`.

A session's requests go to one replica, by the hash of `x-session-id`. That is only speed: any other replica that gets
one loads the session from the store.
"""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from llamamem.scale.replica import Options, Replica

ROUTER = "ray.serve.experimental.consistent_hash_router.ConsistentHashRouter"


@serve.ingress()
class _Replica:
    """One replica. Its health is that of the light probe; one that fails it is replaced by Ray."""

    def __init__(self, told: dict[str, Any]) -> None:
        self._replica = Replica(Options.of(told)).__enter__()

    def __serve_build_asgi_app__(self) -> Any:
        return self._replica.gateway

    def check_health(self) -> None:
        self._replica.check()

    def __del__(self) -> None:
        if hasattr(self, "_replica"):
            self._replica.__exit__()


MEMORY: Any = serve.deployment(
    name="memory",
    num_replicas=1,
    max_ongoing_requests=64,
    health_check_period_s=2,
    health_check_timeout_s=10,
    graceful_shutdown_timeout_s=20,
    ray_actor_options={"num_cpus": 1},
    request_router_config=RequestRouterConfig(request_router_class=ROUTER),
)(_Replica)


def application(args: dict[str, Any]) -> Application:
    """What `import_path: llamamem.scale.app:application` names; `args` are those of Options, which are checked here."""
    Options.of(args)
    bound: Application = MEMORY.bind(args)
    return bound

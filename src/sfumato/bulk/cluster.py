"""The Ray executor: one warm pipeline per actor, one small message per batch, and no pixels in the object store.

Ray guarantees nothing about an image: an actor can die, and its batch then fails with an error. Keys, renames and the
ledger ensure that each image is stored exactly once, so it does no harm to generate a batch twice.
"""

from __future__ import annotations

import os
import secrets
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from sfumato.bulk import extras
from sfumato.bulk.painter import FATAL, Painter
from sfumato.errors import SfumatoError, UsageError
from sfumato.values import reason

if TYPE_CHECKING:
    from sfumato.bulk.ledger import Ledger
    from sfumato.bulk.painter import Work
    from sfumato.bulk.run import Batch, Drawn, Ending, Queue

__all__ = ["Pool", "connected"]

# Batches queued at each actor, so that it is never idle; seconds between checks for a request to stop.
AHEAD, LOOK = 2, 1.0
# Bytes of the local cluster's object store. Messages are small, so it holds almost nothing.
STORE = 128 * 2**20


@contextmanager
def connected(address: str | None, cpus: int | None = None) -> Iterator[dict[str, float]]:
    """Connect to Ray within the block: to the cluster at an address ("auto" for this machine's), or to a new local one.

    Connections need the cluster's token; a local cluster gets a new one, which is not written to any file. Yields the
    cluster's resources. Raises `UsageError` if no cluster answers, and `MissingExtra` without Ray.
    """
    ours = {"RAY_AUTH_MODE": "token"}
    if address is None and "RAY_AUTH_TOKEN" not in os.environ:
        ours["RAY_AUTH_TOKEN"] = secrets.token_hex(32)
    os.environ.update({name: value for name, value in ours.items() if name not in os.environ})
    ray = extras.ray()  # reads the environment when it is imported
    own = {} if address else {"num_cpus": cpus, "object_store_memory": STORE, "include_dashboard": False}
    # Ray prints messages about dead workers to standard output, which is for results.
    with redirect_stdout(sys.stderr), _initialized(ray, address, own):
        yield ray.cluster_resources()


@contextmanager
def _initialized(ray: Any, address: str | None, own: dict[str, Any]) -> Iterator[None]:
    try:
        ray.init(address=address or "local", log_to_driver=False, logging_level="ERROR", **own)
    except Exception as error:
        raise UsageError(
            f"no Ray cluster answers at {address or 'local'} ({reason(error)}); start one with 'ray start --head', and "
            "set RAY_AUTH_TOKEN here to the token that 'ray get-auth-token' prints there"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


@dataclass
class Pool:
    """An executor that generates images in Ray actors.

    least: actors that must start within `patience` seconds; most: actors to request, for which an autoscaler may add
    machines; restarts: actors that may die before the run stops; cpus, gpus: resources of each actor.
    """

    work: Work
    least: int = 1
    most: int = 1
    restarts: int = 100
    cpus: float = 1
    gpus: float = 0
    patience: float = 600.0
    _asked: dict[Any, dict[Any, Batch]] = field(default_factory=dict, init=False)  # of each actor, in order
    _ready: set[Any] = field(default_factory=set, init=False)
    _begun: int = field(default=0, init=False)

    def __call__(self, queue: Queue, ledger: Ledger, ending: Ending) -> Iterator[Drawn]:
        """Run the executor. Raises `SfumatoError` if too few actors start or too many die."""
        ray, since = extras.ray(), time.monotonic()
        for _ in range(self.most):
            self._begin(ray)
        while True:
            for actor in () if ending else self._ready:
                while len(self._asked[actor]) < AHEAD and (batch := queue.take()) is not None:
                    self._asked[actor][actor.draw.remote(batch)] = batch
            waiting = {one: actor for actor, asked in self._asked.items() for one in asked}
            if not any(self._asked[waiting[one]][one] for one in waiting) and (ending or self._ready):
                return
            for one in ray.wait(list(waiting), num_returns=1, timeout=LOOK)[0]:
                yield self._settled(ray, waiting[one], one, queue)
            if len(self._ready) < self.least and time.monotonic() - since > self.patience:
                raise SfumatoError(
                    f"after {self.patience:.0f} s, only {len(self._ready)} of {self.least} workers have started; "
                    "lower --workers, or add machines"
                )

    def _begin(self, ray: Any) -> None:
        self._begun += 1
        if self._begun > self.most + self.restarts:
            raise SfumatoError(
                f"{self.restarts} workers have died; check Ray's logs for the cause, or raise --max-restarts"
            )
        options = {"num_cpus": self.cpus, "num_gpus": self.gpus, "max_restarts": 0}
        actor = ray.remote(Painter).options(**options).remote(replace(self.work, threads=max(1, int(self.cpus))))
        self._asked[actor] = {actor.draw.remote([]): []}  # answered when its pipeline is warm

    def _settled(self, ray: Any, actor: Any, one: Any, queue: Queue) -> Drawn:
        try:
            entries = ray.get(one)
        except ray.exceptions.RayActorError as error:
            return self._died(ray, actor, error, queue)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, FATAL):
                raise error.cause from None
            entries = error.cause if isinstance(error.cause, Exception) else error
        self._ready.add(actor)
        return self._asked[actor].pop(one), entries

    def _died(self, ray: Any, actor: Any, error: Exception, queue: Queue) -> Drawn:
        """Replace a dead actor. The batch that it was generating fails, as it may be the cause."""
        if getattr(error, "actor_init_failed", False):  # a new actor would fail too
            raise SfumatoError(f"a worker could not start: {_last_line(error)}") from error
        first, *others = self._asked.pop(actor).values()
        self._ready.discard(actor)
        for batch in others:
            queue.back(batch)
        self._begin(ray)
        return first, SfumatoError("the worker died while generating this image")


def _last_line(error: Exception) -> str:
    """Return the message of an actor's exception, which is the last line of Ray's traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return reason(Exception(lines[-1] if lines else ""))

"""What a recipe's `fleet: flower` is. Flower is imported once it is used: a plan for one process needs none of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from atoll.cache import home
from atoll.fleet.flower import quiet
from atoll.fleet.inprocess import Prepared, Rebuild

if TYPE_CHECKING:
    from atoll.fleet.flower.federation import Federation
    from atoll.fleet.flower.tasks import Flower


@dataclass(frozen=True)
class OverNetwork:
    """See `flower`."""

    server: str
    keys: str
    ordered: bool
    insecure: bool

    @property
    def federation(self) -> Federation:
        """The connection that all stages of this process share."""
        quiet(home() / "flower")
        from atoll.fleet.flower.federation import federation

        return federation(self.server, self.keys, self.insecure)

    def prepare(self, plan: str, tree: Mapping[str, Any], model: str, answers: Callable[[int], float]) -> Prepared:
        """Has the sites get ready; see `Federation.prepare`."""
        return self.federation.prepare(plan, tree, model, answers)

    def __call__(self, names: Sequence[str], client: object, rebuild: Rebuild, clock: float) -> Flower:
        """The fleet of a stage: its clients are made by the sites, its clock is the time of day."""
        federation = self.federation
        from atoll.fleet.flower.tasks import Flower

        return Flower(federation, list(names), rebuild.run, rebuild.plan, self.ordered)


def flower(server: str, keys: str = "certs/operator", ordered: bool = False, insecure: bool = False) -> OverNetwork:
    """Sites on machines of their own, which join a server by `atoll join`.

    Args:
        server: HOST:PORT of `atoll server`.
        keys: the operator's folder that `atoll certs init` made.
        ordered: add replies in the order in which clients were asked, as a simulation does: the same bits in every run, at
            the cost of keeping early replies in memory.
        insecure: without TLS, to a server on this machine alone.
    """
    return OverNetwork(server, keys, ordered, insecure)

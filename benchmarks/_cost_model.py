"""Cost model of collectives: latency plus bytes over bandwidth, for rings and for trees.

After Thakur, Rabenseifner and Gropp, "Optimization of Collective Communication Operations in
MPICH" (2005). The faster of a ring and a tree counts, because
communication libraries choose it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, log2


@dataclass(frozen=True)
class NetworkLink:
    """Link between two ranks.

    Attributes:
        latency: Latency of a message, in seconds.
        bandwidth: Bandwidth of one rank in one direction, in bytes per second.
    """

    latency: float
    bandwidth: float


@dataclass(frozen=True)
class Place:
    """Distribution of the ranks of a group over nodes.

    Attributes:
        ranks: Number of ranks in the group.
        max_per_node: Largest number of them on one node.
    """

    ranks: int
    max_per_node: int

    @staticmethod
    def of(ranks: Sequence[int], ranks_per_node: int) -> "Place":
        """Return the distribution of a group of ranks, which fill one node after the other."""
        nodes = [rank // ranks_per_node for rank in ranks]
        return Place(len(nodes), max(nodes.count(node) for node in set(nodes)))


@dataclass(frozen=True)
class Network:
    """Network of nodes in which each rank has a separate adapter.

    Attributes:
        within: Link inside a node.
        between: Link of one adapter.
        ranks_per_node: Number of ranks per node.
    """

    within: NetworkLink
    between: NetworkLink
    ranks_per_node: int

    def seconds(self, operation: str, size: float, place: Place) -> float:
        """Return the seconds of one call.

        Args:
            operation: Name: all-reduce, all-gather, reduce-scatter, all-to-all, broadcast, send or
                receive.
            size: Bytes of the input of a rank or of its output, whichever are more.
            place: Distribution of its group.
        """
        p = place.ranks
        if p == 1:
            return 0.0
        own, ring = self._links(place)
        steps = ceil(log2(p))
        part = size / p
        if operation in ("send", "receive"):
            return own.latency + size / own.bandwidth
        if operation == "all-to-all":  # each rank sends to every other rank in turn
            return (p - 1) * (own.latency + part / own.bandwidth)
        around = (p - 1) * (ring.latency + part / ring.bandwidth)
        doubling = steps * own.latency + (p - 1) * part / own.bandwidth
        down = steps * (own.latency + size / own.bandwidth)
        if operation in ("all-gather", "reduce-scatter"):
            return min(around, doubling)
        if operation == "all-reduce":  # reduce-scatter and all-gather; or up a tree and down
            return min(2 * around, 2 * doubling, 2 * down)
        if operation == "broadcast":  # down a tree; or scatter and all-gather
            return min(down, doubling + around)
        raise ValueError(f"the cost of {operation} is not known")

    def _links(self, place: Place) -> tuple[NetworkLink, NetworkLink]:
        """Return the slowest link that a rank uses, and that of a ring.

        Libraries use one ring per adapter of a node, so that a group has the bandwidth of as many
        adapters as it has ranks on a node.
        """
        if place.max_per_node == place.ranks:
            return self.within, self.within
        bandwidth = min(self.within.bandwidth, place.max_per_node * self.between.bandwidth)
        return self.between, NetworkLink(self.between.latency, bandwidth)

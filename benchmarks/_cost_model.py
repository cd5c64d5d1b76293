"""What a collective costs: latency and bytes over bandwidth, for rings and for trees.

After Thakur, Rabenseifner and Gropp, "Optimization of Collective Communication Operations in
MPICH" (2005). Of a ring and a tree the faster counts, as communication libraries choose.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, log2


@dataclass(frozen=True)
class NetworkLink:
    """A way between two ranks.

    Attributes:
        latency: of a message, seconds.
        bandwidth: of one rank, one way, bytes a second.
    """

    latency: float
    bandwidth: float


@dataclass(frozen=True)
class Place:
    """Where the ranks of a group stand.

    Attributes:
        ranks: in the group.
        in_a_node: the most of them that share a node.
    """

    ranks: int
    in_a_node: int

    @staticmethod
    def of(ranks: Sequence[int], ranks_a_node: int) -> "Place":
        """The place of a group of these ranks, which fill one node after the other."""
        nodes = [rank // ranks_a_node for rank in ranks]
        return Place(len(nodes), max(nodes.count(node) for node in set(nodes)))


@dataclass(frozen=True)
class Network:
    """Nodes of ranks that are close to each other, each rank with a separate adapter.

    Attributes:
        within, between: the link inside a node, and that of one adapter.
        ranks_a_node: ranks in a node.
    """

    within: NetworkLink
    between: NetworkLink
    ranks_a_node: int

    def seconds(self, operation: str, size: float, place: Place) -> float:
        """Time of one call.

        Args:
            operation: all-reduce, all-gather, reduce-scatter, all-to-all, broadcast, send or
                receive.
            size: bytes of the whole tensor: what a rank hands in, or gets when that is more.
            place: of its group.
        """
        p = place.ranks
        if p == 1:
            return 0.0
        own, ring = self._links(place)
        steps = ceil(log2(p))
        part = size / p
        if operation in ("send", "receive"):
            return own.latency + size / own.bandwidth
        if operation == "all-to-all":  # each rank to each other, in turn
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
        raise ValueError(f"no cost is known of {operation}")

    def _links(self, place: Place) -> tuple[NetworkLink, NetworkLink]:
        """The slowest link that a rank uses, and that of a ring.

        Libraries lay one ring through each adapter of a node, so that a group has the bandwidth
        of as many adapters as it has ranks in a node.
        """
        if place.in_a_node == place.ranks:
            return self.within, self.within
        bandwidth = min(self.within.bandwidth, place.in_a_node * self.between.bandwidth)
        return self.between, NetworkLink(self.between.latency, bandwidth)

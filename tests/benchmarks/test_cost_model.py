"""Tests of the cost model against cases computed by hand, on two nodes of four ranks."""

import pytest

from benchmarks._cost_model import Network, NetworkLink, Place

# Inside a node 1 s a message and 8 bytes a second; between nodes 10 s and 2 bytes a second.
NETWORK = Network(NetworkLink(1.0, 8.0), NetworkLink(10.0, 2.0), ranks_per_node=4)
NODE, WORLD, RAIL = Place(4, 4), Place(8, 4), Place(2, 1)


def test_places_follow_from_ranks() -> None:
    assert Place.of(range(4, 8), 4) == NODE
    assert Place.of(range(8), 4) == WORLD
    assert Place.of([1, 5], 4) == RAIL
    assert Place.of([0, 1, 2, 4], 4) == Place(4, 3)


@pytest.mark.parametrize(
    "operation, size, place, seconds",
    [
        # Three steps of 16 bytes around the ring: 3 * (1 + 2). By doubling: 2 * 1 + 3 * 16 / 8.
        ("all-gather", 64, NODE, 8.0),
        ("reduce-scatter", 64, NODE, 8.0),
        ("all-reduce", 64, NODE, 16.0),  # a reduce-scatter and an all-gather
        # Up and down a tree of two levels, 2 * 2 * (1 + 1 / 8), loses to 2 * (2 + 3 / 4 / 8).
        ("all-reduce", 1, NODE, 4.1875),
        ("all-to-all", 64, NODE, 9.0),  # 16 bytes to each of three others
        ("broadcast", 8, NODE, 4.0),  # 2 * (1 + 1)
        ("broadcast", 800, NODE, 77 + 78),  # scatter by a tree, gather around the ring
        ("send", 80, NODE, 11.0),
        # Rings pass four adapters, 8 bytes a second together: 7 * (10 + 1000 / 8). By doubling
        # each rank has its own: 3 * 10 + 7 * 1000 / 2.
        ("all-gather", 8000, WORLD, 945.0),
        ("all-gather", 8, WORLD, 30 + 3.5),
        ("all-to-all", 8000, WORLD, 7 * (10 + 500)),  # each by its own adapter
        ("all-gather", 8, RAIL, 10 + 2.0),
        ("receive", 8, RAIL, 14.0),
    ],
)
def test_operations(operation: str, size: int, place: Place, seconds: float) -> None:
    assert NETWORK.seconds(operation, size, place) == pytest.approx(seconds)


def test_a_rank_alone_sends_nothing_and_unknown_operations_are_refused() -> None:
    assert NETWORK.seconds("all-reduce", 64, Place(1, 1)) == 0
    with pytest.raises(ValueError, match="the cost of scan is not known"):
        NETWORK.seconds("scan", 64, NODE)


def test_a_ring_is_no_faster_than_the_links_inside_a_node() -> None:
    wide = Network(NetworkLink(1.0, 3.0), NetworkLink(1.0, 2.0), ranks_per_node=4)
    assert wide.seconds("all-gather", 8e6, WORLD) == pytest.approx(7e6 / 3, rel=1e-4)

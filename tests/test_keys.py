"""Keys are unique in a process, and so are the numbers of a key's uses in graphs."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from gluon_syncbn.keys import Keys


@pytest.fixture
def keys():
    return Keys()


def test_layers_of_one_name_have_different_keys(keys):
    assert [keys.of_layer(name) for name in ("a", "b", "a", "a")] == ["a", "b", "a#2", "a#3"]
    assert keys.of_layer("") == "" and keys.of_layer("") == "#2"


def test_graphs_with_the_same_keys_have_different_ones(keys):
    assert keys.of_graph(["a", "b", "a"]) == ["a@graph1", "b@graph1", "a@graph1"]
    assert keys.of_graph(key for key in ["a"]) == ["a@graph2"]
    assert keys.of_graph([]) == []


def test_the_keys_of_a_graph_that_is_loaded_again_do_not_grow(keys):
    (once,) = keys.of_graph(["a"])
    assert keys.of_graph([once]) == ["a@graph2"]
    # What only looks like ours is the user's own.
    own = ["a@graph", "a@graph1b", "@graph1a", "a@1"]
    assert keys.of_graph(own) == [f"{key}@graph3" for key in own]


def test_different_keys_of_a_graph_stay_different(keys):
    """A KeyBarrierSum of the user's, and a layer of the same name that was converted."""
    (converted,) = keys.of_graph(["k"])
    assert keys.of_graph(["k", converted, "k"]) == ["k@graph2", "k@graph3", "k@graph2"]


def test_uses_are_numbered_from_0_for_each_key(keys):
    assert [keys.next_call(key) for key in ("a", "b", "a", None, "a", None)] == [0, 0, 1, 0, 2, 1]


def test_nothing_is_given_out_twice_to_threads(keys):
    def take(_):
        return keys.of_layer("a"), keys.of_graph(["a"])[0], keys.next_call("a")

    with ThreadPoolExecutor(8) as pool:
        taken = list(pool.map(take, range(800)))
    assert [len(set(column)) for column in zip(*taken)] == [800] * 3

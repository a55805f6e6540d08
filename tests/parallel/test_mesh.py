"""The mesh: places, splits that work and splits that are refused with the nearest one that does."""

from itertools import product
from math import prod
from pathlib import Path

import pytest

from groundup.base.errors import ConfigError
from groundup.model.config import ModelConfig
from groundup.parallel.config import DIMS, ParallelConfig
from groundup.parallel.mesh import ROW_DIMS, Mesh, check_mesh, degrees_of

WORK = Path(__file__).with_name("work_of_ranks.py")
SHAPE = ModelConfig(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)


def test_every_rank_has_a_place_of_its_own():
    degrees = {"pipeline": 2, "data_replicate": 2, "data_shard": 3, "expert": 2, "tensor": 2}
    meshes = [Mesh(degrees, rank=rank) for rank in range(prod(degrees.values()))]
    places = [tuple(mesh.coordinates[dim] for dim in DIMS) for mesh in meshes]
    assert places == sorted(set(places)) == list(product(*(range(meshes[0].degrees[dim]) for dim in DIMS)))
    shares = {tuple(mesh.coordinates[dim] for dim in ROW_DIMS): mesh.row_share for mesh in meshes}
    assert sorted(shares.values()) == list(range(12)) == list(range(meshes[0].num_row_shares))


def test_the_rest_of_the_ranks_goes_where_it_is_asked_for():
    assert degrees_of(ParallelConfig(tensor=2), 8)["data_replicate"] == 4
    assert degrees_of(ParallelConfig(data_replicate=2, data_shard=-1), 8)["data_shard"] == 4
    assert prod(degrees_of(ParallelConfig(), 1).values()) == 1


@pytest.mark.parametrize(
    ("asked", "ranks", "says", "nearest"),
    [
        ({"tensor": 3}, 8, "tensor 3 is 3 ranks or a multiple, and there are 8", "data_replicate: 8}"),
        ({"data_shard": 3}, 4, "data_shard 3 is 3 ranks", "or set {data_shard: 2, data_replicate: 2}"),
        ({"data_shard": 12}, 8, "data_shard 12 is 12 ranks", "or set {data_shard: 8, data_replicate: 1}"),
        ({"data_replicate": 3, "tensor": 2}, 4, "is 6 ranks, and there are 4", "{tensor: 2, data_replicate: 2}"),
        ({"pipeline": 4, "tensor": 4}, 8, "is 16 ranks", "{tensor: 4, pipeline: 2, data_replicate: 1}"),
    ],
)
def test_a_split_that_does_not_make_the_ranks_is_refused(asked, ranks, says, nearest):
    with pytest.raises(ConfigError) as caught:
        degrees_of(ParallelConfig(**asked), ranks)
    assert caught.value.code == "E-CONFIG-MESH" and says in caught.value.what and nearest in caught.value.next


@pytest.mark.parametrize("bad", [{"tensor": 0}, {"data_replicate": -2}, {"data_shard": -1}])
def test_degrees_that_mean_nothing_are_refused(bad):
    with pytest.raises(ValueError, match=r"degree|greater"):
        ParallelConfig(**bad)


@pytest.mark.parametrize(
    ("degrees", "changes", "says", "then"),
    [
        ({"tensor": 3}, {}, "num_attention_heads=4 is no multiple", "parallel.tensor: 2"),
        (
            {"tensor": 4, "data_replicate": 3},
            {},
            "num_key_value_heads=2 is no multiple",
            "parallel.tensor: 2, for as many ranks with data_replicate: 6",
        ),
        ({"tensor": 2}, {"vocab_size": 97}, "vocab_size=97 is no multiple", "parallel.tensor: 1"),
        ({"expert": 2}, {}, "no experts", "leave parallel.expert out"),
        ({"pipeline": 3}, {}, "there are 2 layers", "2 or fewer"),
        ({"context": 3}, {}, "row_length / 2=32 is no multiple", "parallel.context: 2"),
    ],
)
def test_a_model_that_does_not_divide_is_refused(degrees, changes, says, then):
    shape = SHAPE.model_copy(update=changes)
    with pytest.raises(ConfigError) as caught:
        check_mesh(Mesh(degrees).degrees, shape, row_length=64, has_adapter=False)
    assert says in caught.value.what and then in caught.value.next


@pytest.mark.parametrize("dim", ["tensor", "pipeline"])
def test_adapters_are_not_cut(dim):
    check_mesh(Mesh({"data_shard": 2}).degrees, SHAPE, row_length=64, has_adapter=True)
    with pytest.raises(ConfigError, match="whole layers"):
        check_mesh(Mesh({dim: 2}).degrees, SHAPE, row_length=64, has_adapter=True)


@pytest.mark.costly
def test_equal_meshes_share_their_groups(on_four_ranks):
    """Each group of gloo is threads that wake all the time: 300 of them took the machine from the ranks."""
    for answer in on_four_ranks(WORK, "groups_of_equal_meshes"):
        first, *later = answer["value"]
        assert first and later == [first] * 3

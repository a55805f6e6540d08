"""Two ranks train as one does: gradients, sums, seeds, the order of the data, and the same bits each time."""

import importlib.util
from collections import Counter
from pathlib import Path

import pytest
import torch

from groundup.parallel.world import World

pytestmark = pytest.mark.end_to_end  # whole processes, seconds each

STEPS = 9
WORK = Path(__file__).with_name("work_of_ranks.py")
spec = importlib.util.spec_from_file_location("work_of_ranks", WORK)
work = importlib.util.module_from_spec(spec)
spec.loader.exec_module(work)


@pytest.fixture(autouse=True)
def settings_of_torch():
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


def flat(answer):
    return torch.tensor(
        [number for name in sorted(answer["gradients"]) for number in answer["gradients"][name]]
    ).double()


RAGGED = [16, 1, 0, 9, 3, 0, 12, 5]
MASKED_ON_RANK_0 = [0, 0, 0, 0, 3, 0, 12, 5]
MASKED_ON_RANK_1 = [5, 2, 16, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("has_dropout", [False, True])
@pytest.mark.parametrize("labels", [RAGGED, MASKED_ON_RANK_0, MASKED_ON_RANK_1])
def test_gradients_do_not_depend_on_the_number_of_ranks(on_two_ranks, labels, has_dropout):
    """P04: a micro-batch or a rank without labels too."""
    for rows in (1, 2, 3, 8):
        alone = work.gradients(World(), labels, rows, has_dropout)
        both = [answer["value"] for answer in on_two_ranks(WORK, "gradients", labels, rows, has_dropout)]
        expected = flat(alone)
        assert expected.norm() > 0.1 and len(alone["gradients"]) > 5
        for answer in both:
            assert answer["gradients"].keys() == alone["gradients"].keys()
            assert (flat(answer) - expected).norm() <= 1e-6 * expected.norm(), f"{rows=}"
            assert answer["num_loss_tokens"] == sum(labels) and answer["loss"] == pytest.approx(alone["loss"], rel=1e-6)
        assert both[0]["norm"] == both[1]["norm"] and both[0]["gradients"] == both[1]["gradients"]
        assert both[0]["rows"] + both[1]["rows"] == alone["rows"], "the seed's key is the row in the batch"


@pytest.mark.parametrize("labels", [RAGGED, MASKED_ON_RANK_0])
def test_terms_and_loads_are_those_of_all_ranks(on_two_ranks, labels):
    """A rank without supervised tokens computes nothing, and still knows the names of what is summed."""
    alone = work.totals(World(), labels)
    assert set(alone["source_loss"]) == {"a", "b"}
    assert alone["squares"] > 1e-4 and alone["expert_load"][0][0] == sum(labels)
    for answer in on_two_ranks(WORK, "totals", labels):
        assert answer["value"] == alone | {
            name: pytest.approx(alone[name], rel=1e-6) for name in ("squares", "source_loss")
        }


def test_a_batch_without_labels_has_no_gradients_on_any_rank(on_two_ranks):
    for answer in on_two_ranks(WORK, "gradients", [0] * 8, 2, False):
        assert answer["value"] | {"rows": []} == {
            **{"rows": [], "loss": None, "num_loss_tokens": 0, "norm": 0.0, "gradients": {}}
        }


def test_two_ranks_give_the_same_bits_each_time_however_often_they_stop(on_two_ranks, tmp_path):
    work.write_tokens(tmp_path)
    once, again = (on_two_ranks(WORK, "train", str(tmp_path), name) for name in ("once", "again"))
    assert [answer["value"]["ended"] for answer in once] == ["finished"] * 2
    bits = [[(a["value"]["weights"], a["value"]["metrics"]) for a in answers] for answers in (once, again)]
    assert bits[0] == bits[1] and bits[0][0] == bits[0][1]
    assert [answer["value"]["num_samples"] for answer in once] == [5, 0], "rank 0 alone samples"
    # a signal that only one of the ranks got ends both after the same step, and nothing is lost
    for stop in ((1, 2), (0, 4)):
        for rank, answer in enumerate(on_two_ranks(WORK, "train", str(tmp_path), "broken", stop)):
            name = "SIGINT" if rank == stop[0] else "a signal to another rank"
            assert answer["value"]["ended"].startswith(f"stopped by {name} after step {stop[1]} of {STEPS}")
    ended = on_two_ranks(WORK, "train", str(tmp_path), "broken")
    assert [(a["value"]["weights"], a["value"]["metrics"]) for a in ended] == bits[0]
    assert ended[0]["value"]["exact"] is True and ended[0]["value"]["ranks"] == 2


def test_from_one_rank_to_two_and_back_every_token_is_a_target_once(on_two_ranks, tmp_path):
    num_tokens = work.write_tokens(tmp_path)
    first = work.train(World(), tmp_path, "run", stop=(0, 2))
    second = [answer["value"] for answer in on_two_ranks(WORK, "train", str(tmp_path), "run", (0, 5))]
    third = work.train(World(), tmp_path, "run")
    assert (first["step"], second[0]["step"], second[1]["step"], third["step"]) == (2, 5, 5, STEPS)
    assert all(part["targets"] for part in (first, *second, third))
    seen = Counter(token for part in (first, *second, third) for token in part["targets"])
    # the batch that ends the epoch begins the next one: what is there twice is of the first rows again
    rows = STEPS * 4
    epoch = Counter(work_targets(tmp_path, rows))
    assert set(seen) == set(range(1, num_tokens + 1)) and seen == epoch
    worlds = [event["detail"].partition(":")[0] for event in third["events"] if event["kind"] == "world"]
    assert worlds == ["1 rank → 2 ranks", "2 ranks → 1 rank"] and third["exact"] is False
    unbroken = work.train(World(), tmp_path, "unbroken")
    assert unbroken["exact"] is True and Counter(unbroken["targets"]) == seen


def work_targets(folder, num_rows):
    """Targets of the first rows, read past training."""
    store = work.TokenStore(folder, "train", vocab_size=work.VOCAB)
    rows = work.PackedDocuments(store, row_length=16, seed=3)
    return [int(label) for row in range(num_rows) for label in rows.row(row)[1] if label > 0]


def test_a_slow_rank_is_named_once_and_nothing_is_aborted(on_two_ranks, tmp_path):
    work.write_tokens(tmp_path)
    for answer in on_two_ranks(WORK, "train_beside_a_slow_rank", str(tmp_path)):
        assert answer["value"]["ended"] == "finished" and answer["value"]["step"] == 17
        named = [event for event in answer["value"]["events"] if event["kind"] == "straggler"]
        assert [event["step"] for event in named] == [8], "compared again at step 16"
        assert named[0]["detail"].startswith("rank 1 computes ") and "x the median of the others" in named[0]["detail"]
        assert not [event for event in evenly_fast(on_two_ranks, tmp_path) if event["kind"] == "straggler"]


def evenly_fast(on_two_ranks, folder):
    return on_two_ranks(WORK, "train", str(folder), "even")[0]["value"]["events"]


def test_a_flipped_bit_stops_both_ranks_before_it_is_saved(on_two_ranks, tmp_path):
    work.write_tokens(tmp_path)
    for answer in on_two_ranks(WORK, "train", str(tmp_path), "run", (-1, 0), 5):
        assert answer["error"].startswith("E-DIVERGED: rank 1 holds other weights than rank 0, first in ")
        assert "at step 6." in answer["error"]
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-000003"]

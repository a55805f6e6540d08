"""Memory that suffices or not, before the first step."""

import re
from dataclasses import replace

import pytest
import torch

from groundup.base import machine
from groundup.base.errors import DoesNotFit
from groundup.model.config import ModelConfig
from groundup.train.fit import fitting_rows, memory_of_a_rank, training_of
from groundup.train.footprint import footprint
from groundup.train.resolve import resolve, resolve_once, write_resolved
from groundup.train.run import TrainingRun

SHAPE = ModelConfig(
    hidden_size=512,
    intermediate_size=1408,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    vocab_size=6400,
)
SIZES = {"rows_per_epoch": 10, "matrix_parameters": 1000}


@pytest.fixture
def make_training(make_config):
    def make(rows=8, num_lanes=1, **changes):
        config = make_config(**({"row_length": 512, "batch_size_tokens": 512 * 8} | changes))
        return training_of(config, share_rows=8, rows=rows, num_lanes=num_lanes)

    return make


def test_what_fits_stays_as_it_was(make_training):
    training = make_training()
    needed = footprint(SHAPE, training).total
    assert fitting_rows(SHAPE, training, needed, is_auto=True) == (8, 1)
    assert fitting_rows(SHAPE, training, needed - 1, is_auto=True) == (4, 1)


def test_rows_and_then_lanes_shrink_until_it_fits(make_training):
    training = make_training(rows=4, num_lanes=2)
    found = set()
    for rows, lanes in ((4, 2), (2, 2), (1, 2), (1, 1)):
        limit = footprint(SHAPE, replace(training, rows=rows, num_lanes=lanes)).total
        found.add(fitting_rows(SHAPE, training, limit, is_auto=True))
    assert found == {(4, 2), (2, 2), (1, 2), (1, 1)}


def test_rows_that_were_asked_for_are_not_changed(make_training):
    training = make_training(rows=8)
    limit = footprint(SHAPE, replace(training, rows=1)).total
    with pytest.raises(DoesNotFit, match=r"E-MEMORY: training needs .* MB and there are .* MB \(.*activations .* MB"):
        fitting_rows(SHAPE, training, limit, is_auto=False)
    with pytest.raises(DoesNotFit, match=r"What fits: micro_batch_rows: 1$"):
        fitting_rows(SHAPE, training, limit, is_auto=False)


@pytest.mark.parametrize("has_bf16", [False, True])
def test_what_is_proposed_fits(monkeypatch, make_training, has_bf16):
    """Less and less memory: each proposal adds to the ones before, and the words say what was changed."""
    monkeypatch.setattr(machine, "has_fast_bf16", lambda: has_bf16)
    training = make_training(checkpoint_every="5 steps", optimizer="adamw")
    proposals, limit = [], footprint(SHAPE, training).total
    while True:
        limit -= limit // 50
        try:
            fitting_rows(SHAPE, training, limit, is_auto=False)
        except DoesNotFit as error:
            proposals.append(error.next)
            if error.next.startswith("take a smaller model"):
                break
    order = list(dict.fromkeys(proposals))
    assert order[0] == "what fits: micro_batch_rows: 1"
    assert "what fits: micro_batch_rows: 1, activation_checkpointing: block" in order
    assert "what fits: micro_batch_rows: 1, activation_checkpointing: block, optimizer: adamw_8bit" in order
    assert any(re.search(r"checkpoint_every left out, row_length: (256|128)$", words) for words in order)
    assert not any("bf16" in words for words in order), "with single rows the copy of the weights is more than it saves"


def test_bf16_is_proposed_where_it_saves_memory(monkeypatch, make_training):
    monkeypatch.setattr(machine, "has_fast_bf16", lambda: True)
    training = make_training(rows=1, row_length=32768, optimizer="adamw_8bit", activation_checkpointing="block")
    limit = footprint(SHAPE, replace(training, precision="bf16")).total
    with pytest.raises(DoesNotFit, match=r"What fits: precision: bf16$"):
        fitting_rows(SHAPE, training, limit, is_auto=False)


def test_rows_that_were_asked_for_go_through_in_fewer_lanes(monkeypatch, make_config):
    """What is proposed is taken: the run counted more lanes than the proposal and refused it again."""
    monkeypatch.setattr(machine, "num_cores", lambda: 4)
    config = make_config(row_length=512, batch_size_tokens=512 * 8, micro_batch_rows=1, num_threads="auto")
    one_lane = training_of(config, share_rows=8, rows=1, precision="fp32", attention="sdpa")
    assert resolve(config, **SIZES).num_lanes == 4
    monkeypatch.setattr(machine, "memory_limit_bytes", lambda: footprint(SHAPE, one_lane).total)
    found = resolve(config, **SIZES, shape=SHAPE)
    assert (found.micro_batch_rows, found.num_lanes) == (1, 1)


def test_a_run_that_goes_on_with_less_memory_takes_fewer_rows_and_is_marked(monkeypatch, make_config, tmp_path):
    config = make_config(row_length=256, batch_size_tokens=8192, micro_batch_rows="auto")
    began = resolve_once(tmp_path, config, **SIZES, shape=SHAPE)
    write_resolved(tmp_path, began, config)
    assert (began.micro_batch_rows, began.shrunk_from) == (8, None)
    training = training_of(config, share_rows=32, rows=2)
    monkeypatch.setattr(machine, "memory_limit_bytes", lambda: footprint(SHAPE, training).total)
    for _ in range(2):
        found = resolve_once(tmp_path, config, **SIZES, shape=SHAPE)
        write_resolved(tmp_path, found, config)
        assert (found.micro_batch_rows, found.shrunk_from) == (2, 8)


def test_memory_is_a_fact_of_the_machine(monkeypatch):
    monkeypatch.setattr(machine, "memory_limit_bytes", lambda: 8 << 30)
    assert memory_of_a_rank("cpu", 1) == 8 << 30 and memory_of_a_rank("cpu", 4) == 2 << 30
    device = type("Device", (), {"total_memory": 80 << 30})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
    assert memory_of_a_rank("cuda", 4) == 80 << 30


def test_micro_batch_auto_is_the_smaller_of_cache_and_memory(monkeypatch, make_config):
    config = make_config(row_length=256, batch_size_tokens=8192, micro_batch_rows="auto")
    by_cache = resolve(config, **SIZES)
    assert by_cache.micro_batch_rows == 8
    monkeypatch.setattr(machine, "memory_limit_bytes", lambda: 1 << 40)
    assert resolve(config, **SIZES, shape=SHAPE) == by_cache, "memory enough: the same as without counting it"
    training = training_of(config, share_rows=32, rows=2)
    monkeypatch.setattr(machine, "memory_limit_bytes", lambda: footprint(SHAPE, training).total)
    assert resolve(config, **SIZES, shape=SHAPE).micro_batch_rows == 2


def test_a_run_that_cannot_fit_ends_before_its_first_step(make_job, monkeypatch):
    monkeypatch.setattr(machine, "memory_limit_bytes", lambda: 100 << 20)
    with pytest.raises(DoesNotFit, match=r"E-MEMORY.*process 377 MB.*Take a smaller model"):
        TrainingRun(make_job("run", micro_batch_rows="auto"))

"""What `auto` becomes."""

import pytest
import torch

from groundup.base import machine
from groundup.base.errors import ConfigError
from groundup.base.files import read_json, write_json
from groundup.model.config import ModelConfig
from groundup.parallel.config import ParallelConfig
from groundup.parallel.world import World
from groundup.train import resolve as resolve_module
from groundup.train.resolve import (
    CPU_MICRO_BATCH_TOKENS,
    GFLOPS_PER_CORE,
    RESOLVED,
    apply_threads,
    resolve,
    resolve_once,
    shrink_for_good,
    write_resolved,
)
from groundup.train.run import TrainingRun


def resolved(config, rows_per_epoch=10, matrix_parameters=1000):
    return resolve(config, rows_per_epoch=rows_per_epoch, matrix_parameters=matrix_parameters)


def resolved_in(folder, config, **sizes):
    """As a run that began: what it goes by is written."""
    found = resolve_once(folder, config, **sizes)
    write_resolved(folder, found, config)
    return found


@pytest.mark.parametrize("row_length", [16, 100, 256, 512, 2048, 5000])
@pytest.mark.parametrize("batch_rows", [1, 2, 6, 7, 24, 64, 97])
def test_micro_batches_divide_the_batch_or_are_nearly_even(make_config, row_length, batch_rows):
    config = make_config(row_length=row_length, batch_size_tokens=row_length * batch_rows, micro_batch_rows="auto")
    found = resolved(config)
    rows = found.micro_batch_rows
    assert found.batch_rows == batch_rows and (rows == 1 or rows * row_length <= CPU_MICRO_BATCH_TOKENS)
    num_micro_batches = -(-batch_rows // rows)
    least = -(-batch_rows // max(1, CPU_MICRO_BATCH_TOKENS // row_length))
    assert num_micro_batches <= 2 * least, "a batch that has no divisors is not cut into single rows"
    if batch_rows % rows:
        assert batch_rows - rows * (num_micro_batches - 1) > rows - num_micro_batches, "as even as can be"


def test_a_micro_batch_is_no_larger_than_the_batch(make_config):
    assert resolved(make_config(micro_batch_rows=64)).micro_batch_rows == 4


@pytest.mark.parametrize(("batch", "nearest"), [(100, 96), (70, 64), (127, 128), (3, 16)])
def test_a_batch_that_rows_do_not_divide_is_refused_with_the_nearest(make_config, batch, nearest):
    with pytest.raises(
        ConfigError, match=f"batch_size_tokens={batch} is not a multiple of row_length=16. Use {nearest}$"
    ):
        resolved(make_config(batch_size_tokens=batch))
    assert resolved(make_config(batch_size_tokens=nearest)).batch_rows == nearest // 16


@pytest.mark.parametrize(
    ("is_fast", "compiles", "precision", "attention"),
    [(True, True, "bf16", "chunked"), (True, False, "bf16", "sdpa"), (False, True, "fp32", "sdpa")],
)
def test_precision_and_attention_follow_the_machine(monkeypatch, make_config, is_fast, compiles, precision, attention):
    monkeypatch.setattr(machine, "has_fast_bf16", lambda: is_fast)
    monkeypatch.setattr(machine, "has_compiler", lambda: True)
    found = resolved(make_config(precision="auto", attention="auto", compile=compiles))
    assert (found.precision, found.attention) == (precision, attention)
    assert found.dtype == {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
    assert resolved(make_config(precision="auto", attention="dense")).attention == "dense"


def test_only_long_runs_with_a_compiler_are_compiled(monkeypatch, make_config):
    config = make_config(compile="auto")
    monkeypatch.setattr(machine, "has_compiler", lambda: True)
    assert not resolved(config).compile
    assert resolved(config, matrix_parameters=10**12).compile
    monkeypatch.setattr(machine, "has_compiler", lambda: False)
    assert not resolved(config, matrix_parameters=10**12).compile
    with pytest.raises(ConfigError, match="E-CONFIG-COMPILE"):
        resolved(make_config(compile=True))


@pytest.mark.parametrize(
    ("seconds", "precision", "compiles"), [(100, "bf16", 0), (150, "bf16", 1), (800, "fp32", 0), (1000, "fp32", 1)]
)
def test_a_run_in_bf16_wins_back_its_compiling_sooner(monkeypatch, make_config, seconds, precision, compiles):
    """Seconds by nominal rates of one core."""
    monkeypatch.setattr(machine, "has_compiler", lambda: True)
    monkeypatch.setattr(machine, "num_cores", lambda: 1)
    config = make_config(compile="auto", precision=precision, duration="100 steps")
    rate = GFLOPS_PER_CORE[torch.bfloat16 if precision == "bf16" else torch.float32] * 1e9
    parameters = int(seconds * rate / (6 * 100 * config.batch_size_tokens))
    assert resolved(config, matrix_parameters=parameters).compile == bool(compiles)


@pytest.mark.parametrize(
    ("changes", "lanes", "rows"),
    [
        ({"row_length": 256, "batch_size_tokens": 2048}, 3, 2),
        ({"row_length": 256, "batch_size_tokens": 1024}, 2, 2),
        ({"row_length": 256, "batch_size_tokens": 768}, 1, 3),
        ({"row_length": 256, "batch_size_tokens": 2048, "num_threads": 1}, 1, 8),
        ({"row_length": 256, "batch_size_tokens": 2048, "num_threads": 2}, 2, 4),
        ({"row_length": 256, "batch_size_tokens": 2048, "micro_batch_rows": 8}, 1, 8),
        ({"row_length": 512, "batch_size_tokens": 8192, "num_threads": 2}, 2, 2),
        ({"row_length": 512, "batch_size_tokens": 8192, "num_threads": 8}, 8, 1),
        ({"row_length": 2048, "batch_size_tokens": 2048}, 1, 1),
    ],
)
def test_lanes_share_a_batch_that_is_large_enough(monkeypatch, make_config, changes, lanes, rows):
    monkeypatch.setattr(machine, "num_cores", lambda: 3)
    config = make_config(**({"micro_batch_rows": "auto", "num_threads": "auto"} | changes))
    found = resolved(config)
    assert (found.num_lanes, found.micro_batch_rows) == (lanes, rows)
    # the generator of dropout belongs to one thread
    sizes = {"rows_per_epoch": 10, "matrix_parameters": 1000}
    assert resolve(config, has_dropout=True, **sizes).num_lanes == 1
    monkeypatch.setattr(machine, "has_compiler", lambda: True)
    assert resolved(config.model_copy(update={"compile": True})).num_lanes == lanes, "compiled code is shared"


def test_cuda_without_cuda_is_refused(monkeypatch, make_config):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="E-CONFIG-DEVICE"):
        resolved(make_config(device="cuda"))
    assert resolved(make_config(device="auto")).device == "cpu"


def test_a_resumed_run_keeps_what_it_began_with(monkeypatch, tmp_path, make_config):
    config = make_config(precision="auto", attention="auto", micro_batch_rows="auto", num_threads="auto")
    sizes = {"rows_per_epoch": 10, "matrix_parameters": 1000}
    monkeypatch.setattr(machine, "has_fast_bf16", lambda: True)
    monkeypatch.setattr(machine, "num_cores", lambda: 7)
    began = resolved_in(tmp_path, config, **sizes)
    monkeypatch.setattr(machine, "has_fast_bf16", lambda: False)
    monkeypatch.setattr(machine, "num_cores", lambda: 3)
    assert resolved_in(tmp_path, config, **sizes) == began
    longer = config.model_copy(update={"duration": "500 steps"})
    assert resolved_in(tmp_path, longer, **sizes).total_steps == 500


@pytest.mark.parametrize("batch_rows", [1, 2, 6, 7, 24, 97])
def test_ranks_share_the_threads_of_their_machine_and_the_rows(make_config, batch_rows):
    config = make_config(row_length=256, batch_size_tokens=256 * batch_rows, micro_batch_rows="auto", num_threads=8)
    sizes = {"rows_per_epoch": 10, "matrix_parameters": 1000}
    world = World(0, 4, num_local=2)
    alone, shared = resolve(config, **sizes), resolve(config, **sizes, world=world)
    assert (alone.num_threads, shared.num_threads, shared.num_ranks) == (8, 4, 4), "two of the four are on this machine"
    share = -(-batch_rows // 4)
    assert share % shared.micro_batch_rows == 0 and shared.num_lanes <= max(1, min(4, share // 2))
    assert shared.total_steps == alone.total_steps and shared.batch_rows == batch_rows
    one_thread = resolve(make_config(num_threads=1), **sizes, world=World(0, 3, num_local=3))
    assert one_thread.num_threads == 1


def test_a_run_on_more_ranks_divides_anew_and_keeps_the_rest(tmp_path, make_config, monkeypatch):
    sizes = {"rows_per_epoch": 10, "matrix_parameters": 1000}
    monkeypatch.setattr(machine, "has_fast_bf16", lambda: True)
    config = make_config(precision="auto", num_threads="auto", micro_batch_rows="auto")
    monkeypatch.setattr(machine, "num_cores", lambda: 4)
    two = World(0, 2, num_local=2)
    began = resolved_in(tmp_path, config, **sizes)
    assert (began.num_threads, began.micro_batch_rows) == (4, 4)
    monkeypatch.setattr(machine, "has_fast_bf16", lambda: False)
    monkeypatch.setattr(machine, "num_cores", lambda: 6)
    spread = resolved_in(tmp_path, config, **sizes, world=two)
    assert (spread.precision, spread.num_threads, spread.micro_batch_rows, spread.num_ranks) == ("bf16", 3, 2, 2)
    monkeypatch.setattr(machine, "num_cores", lambda: 8)
    assert resolved_in(tmp_path, config, **sizes, world=two) == spread, "on two again, as it was on two"
    assert resolved_in(tmp_path, config, **sizes) == began


def test_more_ranks_than_cuda_devices_are_refused(make_config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    sizes = {"rows_per_epoch": 10, "matrix_parameters": 1000}
    with pytest.raises(ConfigError, match="E-CONFIG-DEVICE: 2 ranks on this machine, but torch sees 1 CUDA devices"):
        resolve(make_config(device="cuda"), **sizes, world=World(0, 2, num_local=2))
    assert resolve(make_config(device="cuda"), **sizes, world=World(0, 2, num_local=1)).device == "cuda"


def test_a_run_that_goes_on_without_its_gpu_is_laid_out_for_a_cpu(tmp_path, monkeypatch, make_config):
    """Or refused, as fp16 is: what a GPU alone can do is not pinned for a CPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    sizes = {"rows_per_epoch": 10, "matrix_parameters": 10**16}
    config = make_config(precision="auto", attention="auto", micro_batch_rows="auto", compile="auto", device="auto")
    half = config.model_copy(update={"precision": "fp16"})
    began = resolved_in(tmp_path, config, **sizes)
    assert (began.device, began.attention, began.compile) == ("cuda", "varlen", True)
    (tmp_path / "half").mkdir()
    resolved_in(tmp_path / "half", half, **sizes)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(machine, "has_compiler", lambda: False)
    for _ in range(2):
        later = resolved_in(tmp_path, config, **sizes)
        assert (later.device, later.precision, later.attention, later.compile) == ("cpu", "bf16", "sdpa", False)
    with pytest.raises(ConfigError, match="E-COMBINATION: precision: fp16 with device: cpu"):
        resolved_in(tmp_path / "half", half, **sizes)


def test_varlen_on_an_old_gpu_is_refused(monkeypatch, make_config):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    with pytest.raises(
        ConfigError, match=r"compute capability \(7, 5\): FlashAttention needs 8\.0. Use attention auto"
    ):
        resolved(make_config(device="cuda", precision="fp16", attention="varlen"))


def test_fp16_on_a_cpu_is_refused_with_what_works(make_config):
    with pytest.raises(
        ConfigError, match=r"E-COMBINATION: precision: fp16 with device: cpu: .*slower.*Set precision: auto"
    ):
        resolved(make_config(precision="fp16"))


@pytest.mark.parametrize(
    ("capability", "asked", "precision", "becomes", "tf32"),
    [
        ((9, 0), "auto", "auto", "bf16", False),
        ((7, 5), "auto", "auto", "fp32", False),
        ((9, 0), "auto", "fp32", "fp32", True),
        ((7, 5), "auto", "fp32", "fp32", False),
        ((9, 0), False, "fp32", "fp32", False),
        ((9, 0), "auto", "fp16", "fp16", False),
    ],
)
def test_precision_follows_the_cuda_device(monkeypatch, make_config, capability, asked, precision, becomes, tf32):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    found = resolved(make_config(device="cuda", precision=precision, allow_tf32=asked))
    assert (found.precision, found.allow_tf32) == (becomes, tf32)
    asked_for = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked_for.append)
    apply_threads(found)
    assert asked_for == ["high" if tf32 else "highest"]


def test_tf32_is_nothing_on_a_cpu(monkeypatch, make_config):
    asked_for = []
    monkeypatch.setattr(torch, "set_float32_matmul_precision", asked_for.append)
    found = resolved(make_config(allow_tf32=True))
    apply_threads(found)
    assert not found.allow_tf32 and not asked_for


def test_a_run_of_before_a_setting_goes_on(tmp_path, make_config):
    """A run's resolved settings may lack what was not known when it began."""
    sizes = {"rows_per_epoch": 10, "matrix_parameters": 1000}
    began = resolved_in(tmp_path, make_config(), **sizes)
    values = read_json(tmp_path / RESOLVED)
    del values["allow_tf32"]
    write_json(tmp_path / RESOLVED, values)
    assert resolved_in(tmp_path, make_config(), **sizes) == began


def shape_with(**changes):
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 400}
    return ModelConfig(num_attention_heads=2, num_key_value_heads=1, **(sizes | changes))


@pytest.mark.parametrize(("window", "attention"), [(None, "sdpa"), (17, "sdpa"), (16, "chunked"), (4, "chunked")])
def test_a_cpu_takes_chunks_where_a_window_is_a_quarter_of_the_row(make_config, window, attention):
    config = make_config(attention="auto", row_length=64)
    shape = shape_with(sliding_window=window)
    assert resolve(config, rows_per_epoch=10, matrix_parameters=1000, shape=shape).attention == attention


@pytest.mark.parametrize(
    ("precision", "capability", "head_size", "attention"),
    [
        ("bf16", (9, 0), 128, "varlen"),
        ("fp16", (8, 0), 64, "varlen"),
        ("fp16", (7, 5), 64, "sdpa"),
        ("fp32", (9, 0), 64, "sdpa"),
        ("bf16", (9, 0), 36, "sdpa"),
        ("bf16", (9, 0), 512, "sdpa"),
    ],
)
def test_attention_on_cuda_follows_what_flash_attention_has(
    monkeypatch, make_config, precision, capability, head_size, attention
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(resolve_module, "memory_of_a_rank", lambda device, num_local: 1 << 40)
    sizes = {"rows_per_epoch": 10, "matrix_parameters": 1000, "shape": shape_with(head_dim=head_size)}
    config = make_config(device="cuda", precision=precision, attention="auto")
    assert resolve(config, **sizes).attention == attention
    shared = World(0, 2, num_local=1)
    shared.spread(ParallelConfig(context=2))
    assert resolve(config, **sizes, world=shared).attention == "sdpa", "a part of a row has fewer queries than keys"
    if attention == "sdpa" and precision == "bf16":
        with pytest.raises(ConfigError, match=f"E-CONFIG-ATTENTION: attention varlen with heads of {head_size}"):
            resolve(config.model_copy(update={"attention": "varlen"}), **sizes)


@pytest.mark.parametrize(
    ("attention", "precision", "device", "words"),
    [
        ("varlen", "bf16", "cpu", "a CPU has no kernel for its backward pass. Set attention: auto"),
        ("flex", "fp32", "cpu", "a CPU has no kernel for its backward pass. Set attention: auto"),
        ("varlen", "fp32", "cuda", "FlashAttention computes in bf16 and fp16 alone. Set attention: flex"),
    ],
)
def test_attention_that_cannot_train_is_refused_with_what_can(
    monkeypatch, make_config, attention, precision, device, words
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    with pytest.raises(ConfigError, match=f"E-COMBINATION: .*{words}"):
        resolved(make_config(attention=attention, precision=precision, device=device))


def test_dropout_of_a_section_leaves_one_lane(monkeypatch, make_job):
    monkeypatch.setattr(resolve_module, "LANE_TOKENS", 16)
    changes = {"micro_batch_rows": 1, "num_threads": 2}
    lanes = [TrainingRun(make_job(str(share), dropout=share, **changes)).resolved.num_lanes for share in (0.0, 0.1)]
    assert lanes == [2, 1]


def test_what_a_refused_start_would_have_taken_is_forgotten(tmp_path, make_config):
    sizes = {"rows_per_epoch": 10, "matrix_parameters": 1000}
    short = make_config(duration="100 steps", warmup="5 %")
    resolved_in(tmp_path, short, **sizes)
    longer = short.model_copy(update={"duration": "1000 steps"})
    assert resolve_once(tmp_path, longer.model_copy(update={"warmup": "10 %"}), **sizes).warmup_steps == 100
    assert resolve_once(tmp_path, longer, **sizes).warmup_steps == 5


def test_a_run_made_shorter_than_its_warmup_warms_up_anew(tmp_path, make_config):
    sizes = {"rows_per_epoch": 10, "matrix_parameters": 1000}
    config = make_config(duration="1000 steps", warmup="5 %")
    assert resolved_in(tmp_path, config, **sizes).warmup_steps == 50
    assert resolve_once(tmp_path, config.model_copy(update={"duration": "40 steps"}), **sizes).warmup_steps == 2
    assert resolve_once(tmp_path, config.model_copy(update={"duration": "51 steps"}), **sizes).warmup_steps == 50


def test_a_pinned_compiler_must_be_there(tmp_path, make_config, monkeypatch):
    sizes = {"rows_per_epoch": 10, "matrix_parameters": 10**12}
    monkeypatch.setattr(machine, "has_compiler", lambda: True)
    config = make_config(compile="auto")
    assert resolved_in(tmp_path, config, **sizes).compile
    monkeypatch.setattr(machine, "has_compiler", lambda: False)
    with pytest.raises(ConfigError, match="E-CONFIG-COMPILE"):
        resolve_once(tmp_path, config, **sizes)


def test_memory_that_ran_out_after_a_change_keeps_both(tmp_path, make_config):
    """With another number of ranks than at the beginning, where a change alone is not written."""
    sizes = {"rows_per_epoch": 10, "matrix_parameters": 1000}
    resolved_in(tmp_path, make_config(lr=0.001), **sizes, world=World(0, 2, num_local=2))
    changed = make_config(lr=0.0005)
    shrunk = shrink_for_good(
        tmp_path, resolved_in(tmp_path, changed, **sizes), changed, micro_batch_rows=1, num_lanes=1
    )
    assert shrunk.lr == 0.0005
    again = resolved_in(tmp_path, changed, **sizes)
    assert (again.lr, again.micro_batch_rows, again.shrunk_from) == (0.0005, 1, 2)
    assert resolve_once(tmp_path, make_config(lr=0.001), **sizes).lr == 0.001


def test_an_older_run_s_settings_are_those_the_recipe_says_outright(tmp_path, make_config):
    sizes = {"rows_per_epoch": 10, "matrix_parameters": 1000}
    began = resolved_in(tmp_path, make_config(lr=0.001, muon_lr="auto"), **sizes)
    values = read_json(tmp_path / RESOLVED)
    del values["asked"]
    write_json(tmp_path / RESOLVED, values)
    found = resolve_once(tmp_path, make_config(lr=0.0005, muon_lr="auto"), **sizes | {"matrix_parameters": 9})
    assert (found.lr, found.muon_lr) == (0.0005, began.muon_lr)


def test_rates_are_settled_once(tmp_path, make_config):
    auto = make_config(lr="auto", muon_lr="auto")
    first = resolved_in(tmp_path, auto, rows_per_epoch=10, matrix_parameters=1_000_000)
    assert first.muon_lr == pytest.approx(0.0154 * 8 / 31.6227766) and first.lr == pytest.approx(first.muon_lr / 3)
    # with another law or size a run that goes on keeps its rates, unless they are changed in the recipe
    again = resolved_in(tmp_path, auto, rows_per_epoch=10, matrix_parameters=9)
    assert (again.lr, again.muon_lr) == (first.lr, first.muon_lr)
    changed = make_config(lr=0.5, muon_lr="auto")
    for _ in range(2):
        asked = resolved_in(tmp_path, changed, rows_per_epoch=10, matrix_parameters=9)
        assert (asked.lr, asked.muon_lr) == (0.5, first.muon_lr)
    assert again.settle(auto).lr == first.lr and auto.lr == "auto"


def test_a_decay_is_settled_once_by_the_run_s_length(tmp_path, make_config):
    sizes = {"rows_per_epoch": 10, "matrix_parameters": 1_000_000}
    auto = make_config(muon_lr=0.02, muon_weight_decay="auto", duration="100 steps")
    first = resolved_in(tmp_path, auto, **sizes)
    assert first.muon_weight_decay == pytest.approx(4 / (0.02 * 100))
    assert first.settle(auto).muon_weight_decay == first.muon_weight_decay
    other_law = sizes | {"matrix_parameters": 9}
    assert resolved_in(tmp_path, auto, **other_law).muon_weight_decay == first.muon_weight_decay
    longer = make_config(muon_lr=0.02, muon_weight_decay="auto", duration="200 steps")
    assert resolved_in(tmp_path, longer, **sizes).muon_weight_decay == pytest.approx(first.muon_weight_decay / 2)
    hotter = make_config(muon_lr=0.04, muon_weight_decay="auto", duration="200 steps")
    assert resolved_in(tmp_path, hotter, **sizes).muon_weight_decay == pytest.approx(4 / (0.04 * 200))


def test_the_maker_of_8_bits_is_kept(tmp_path, make_config, monkeypatch):
    config = make_config(optimizer="adamw_8bit")
    assert resolved_in(tmp_path, config, rows_per_epoch=10, matrix_parameters=9).adamw_8bit_maker == "bitsandbytes"
    monkeypatch.setattr(resolve_module, "eight_bit_maker", lambda config: "torchao")
    assert resolved_in(tmp_path, config, rows_per_epoch=10, matrix_parameters=9).adamw_8bit_maker == "bitsandbytes"
    assert resolve(config, rows_per_epoch=10, matrix_parameters=9).adamw_8bit_maker == "torchao"

"""docs/scaling.md: what a rank holds and sends, measured on two and four ranks of this machine beside the formulas, and what the
formulas say from 8 to 1,024 GPUs of an interconnect whose figures are assumed."""

import argparse
import datetime
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib import metadata
from math import prod
from pathlib import Path
from typing import Any

from benchmarks.results import this_machine
from groundup.base.files import atomic_write
from groundup.model.config import ModelConfig
from groundup.optim.config import OptimConfig
from groundup.parallel.config import DIMS, ZERO_STAGES, ParallelConfig
from groundup.parallel.cut import Spread
from groundup.parallel.traffic import sent_bytes
from groundup.proof.rank_server import RankGroup
from groundup.proof.spread import measure, zero_held
from groundup.train.flops import step_flops
from groundup.train.footprint import Training, footprint
from groundup.train.spread_traffic import step_payload

PAGE = Path("docs/scaling.md")
MEASURED = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 2048,
    "tie_word_embeddings": False,
}
EXPERTS = MEASURED | {
    "model_type": "qwen3_moe",
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 96,
    "router_aux_loss_scope": "row",
    "router_aux_loss_coef": 0.01,
}
CASES: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
    ("data alone (each holds all)", MEASURED, {"data_replicate": 2}),
    ("gradients and optimizer in shards (ZeRO-2)", MEASURED, {"data_shard": 2, "shard": "gradients"}),
    ("parameters too (ZeRO-3)", MEASURED, {"data_shard": 2}),
    ("ZeRO-3, four ranks", MEASURED, {"data_shard": 4}),
    ("copies of shards (HSDP)", MEASURED, {"data_replicate": 2, "data_shard": 2}),
    ("tensor", MEASURED, {"tensor": 2}),
    ("tensor, four ranks", MEASURED, {"tensor": 4}),
    ("shards of tensors", MEASURED, {"data_shard": 2, "tensor": 2}),
    ("context", MEASURED, {"context": 2}),
    ("expert", EXPERTS, {"expert": 2}),
    ("shards of experts", EXPERTS, {"data_shard": 2, "expert": 2}),
    ("pipeline", MEASURED, {"pipeline": 2}),
    ("pipeline of shards", MEASURED, {"pipeline": 2, "data_shard": 2}),
)
EIGHT = ModelConfig(
    model_type="llama",
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    vocab_size=128256,
    tie_word_embeddings=False,
)
SEVENTY = EIGHT.model_copy(
    update={
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    }
)
MESHES: tuple[tuple[str, ModelConfig, dict[str, int]], ...] = (
    *(("8 B", EIGHT, {"data_replicate": num // 8, "data_shard": 8}) for num in (8, 32, 128, 512, 1024)),
    ("8 B", EIGHT, {"data_replicate": 1024}),
    ("8 B", EIGHT, {"data_shard": 1024}),
    ("70 B", SEVENTY, {"data_shard": 8}),
    *(("70 B", SEVENTY, {"data_shard": num // 8, "tensor": 8}) for num in (32, 64, 128, 256)),
    ("70 B", SEVENTY, {"data_shard": 256}),
    *(("70 B", SEVENTY, {"data_replicate": num // 256, "data_shard": 32, "tensor": 8}) for num in (512, 1024)),
    ("70 B", SEVENTY, {"data_replicate": 4, "data_shard": 8, "tensor": 8, "pipeline": 4}),
)
BATCH_TOKENS, ROW_LENGTH = 4 << 20, 8192
PEAK_FLOPS, SHARE_OF_PEAK = 989e12, 0.4
MEMORY = 80e9
INSIDE, BETWEEN, SHARE_OF_LINK = 450e9, 50e9, 0.8
NODE = 8
"""What is assumed of the machines: NVIDIA's data sheets of the H100 SXM (dense bf16, 80 GB, NVLink 900 GB/s both ways
together) and of InfiniBand NDR (400 Gb/s for each GPU), and shares of them that good runs reach."""


@dataclass(frozen=True)
class Paper:
    """One mesh on paper."""

    name: str
    degrees: Mapping[str, int]
    memory: int
    compute_seconds: float
    sent: Mapping[str, float]
    """Bytes that a rank sends in a step, by dimension."""
    message_seconds: Mapping[str, float]

    @property
    def tensor_seconds(self) -> float:
        """Of messages that nothing can hide: the next product waits for them."""
        return sum(self.message_seconds.get(dim, 0.0) for dim in ("tensor", "context", "expert"))

    @property
    def other_seconds(self) -> float:
        return sum(self.message_seconds.values()) - self.tensor_seconds


def on_paper(name: str, shape: ModelConfig, degrees: Mapping[str, int]) -> Paper:
    """Memory, arithmetic and messages of a mesh, one row in a micro-batch; of ranks of a pipeline, the most."""
    config = ParallelConfig.model_validate({"data_replicate": 1, **degrees})
    spread = Spread.of(config.degrees, config)
    training = Training(
        rows=1,
        row_length=ROW_LENGTH,
        batch_rows=max(1, BATCH_TOKENS // ROW_LENGTH // spread.num_row_shares),
        optim=OptimConfig(optimizer="adamw"),
        precision="bf16",
        attention="varlen",
        activation_checkpointing="block",
        device="cuda",
        spread=spread,
    )
    sent: dict[str, float] = {}
    for place in range(spread.pipeline):
        at_place = replace(training, spread=replace(spread, place=place))
        for dim, num_bytes in sent_bytes(step_payload(shape, at_place), config.degrees).items():
            sent[dim] = max(sent.get(dim, 0.0), num_bytes)
    pairs = BATCH_TOKENS * (ROW_LENGTH + 1) // 2
    flops = step_flops(shape).of(tokens=BATCH_TOKENS, loss_tokens=BATCH_TOKENS, pairs=pairs)
    again = 4 / 3  # each block's forward pass twice
    waits = 1 + (spread.pipeline - 1) / training.num_micro_batches
    return Paper(
        name,
        degrees,
        memory=footprint(shape, training).total,
        compute_seconds=waits * again * flops / spread.num_ranks / (SHARE_OF_PEAK * PEAK_FLOPS),
        sent=sent,
        message_seconds={dim: num / (SHARE_OF_LINK * _link(dim, config)) for dim, num in sent.items()},
    )


def _link(dim: str, config: ParallelConfig) -> float:
    """Inside a node where all ranks of the dimension, and of those inside it, have room there."""
    inner = [config.degrees[other] for other in DIMS[DIMS.index(dim) :]]
    return INSIDE if prod(inner) <= NODE else BETWEEN


def paper_rows() -> Iterator[str]:
    """The table of meshes on paper."""
    yield "| model | GPUs | mesh | GB a GPU | compute s | GB sent a step, by dimension | messages s: waited for + hidden | step s |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, shape, degrees in MESHES:
        found = on_paper(name, shape, degrees)
        mesh = " × ".join(f"{dim} {degree}" for dim, degree in degrees.items() if degree > 1)
        sent = ", ".join(f"{dim} {num / 1e9:.1f}" for dim, num in found.sent.items())
        lack = " (too much)" if found.memory > MEMORY else ""
        least = max(found.compute_seconds, found.other_seconds) + found.tensor_seconds
        most = found.compute_seconds + found.tensor_seconds + found.other_seconds
        yield (
            f"| {name} | {prod(degrees.values()):,} | {mesh} | {found.memory / 1e9:.0f}{lack} | {found.compute_seconds:.2f} | "
            f"{sent} | {found.tensor_seconds:.2f} + {found.other_seconds:.2f} | {least:.2f} to {most:.2f} |"
        )


def measured_rows() -> Iterator[tuple[str, str]]:
    """Of each case a row of what is held and rows of what is sent."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        numbers = sorted({ParallelConfig.model_validate(parallel).num_ranks for *_, parallel in CASES})
        groups = {num: stack.enter_context(RankGroup(Path(folder) / f"meet-{num}", num)) for num in numbers}
        for name, shape, parallel in CASES:
            num_ranks = ParallelConfig.model_validate(parallel).num_ranks
            plain = ModelConfig.model_validate(shape).model_dump(mode="json")
            answers = groups[num_ranks].run(measure.__name__, "measure", plain, parallel, "adamw", "fp32")
            values = [answer["value"] for answer in answers]
            yield _held_row(name, num_ranks, values), "\n".join(_sent_rows(name, values))


def zero_rows() -> Iterator[str]:
    """Of each stage of DeepSpeed's ZeRO a row of what is held."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        groups = {num: stack.enter_context(RankGroup(Path(folder) / f"meet-{num}", num)) for num in (2, 4)}
        plain = ModelConfig.model_validate(MEASURED).model_dump(mode="json")
        for num_ranks, precision in ((2, "fp32"), (2, "bf16"), (4, "bf16")):
            for shard, stage in ZERO_STAGES.items():
                parallel = {"engine": "deepspeed", "shard": shard, "data_shard": num_ranks}
                answers = groups[num_ranks].run(zero_held.__name__, "zero_held", plain, parallel, precision)
                error = next((answer["error"] for answer in answers if "error" in answer), None)
                if error is not None:
                    raise SystemExit(error)
                name = f"DeepSpeed ZeRO-{stage}, {precision}"
                yield _held_row(name, num_ranks, [answer["value"] for answer in answers])


def _held_row(name: str, num_ranks: int, values: list[dict[str, Any]]) -> str:
    held, planned = ([sum(value[key].values()) for value in values] for key in ("held", "held by formula"))
    off = max(abs(a / b - 1) for a, b in zip(held, planned, strict=True))
    parts = ", ".join(f"{values[0]['held'][part] / 1e6:.2f}" for part in ("weights", "gradients", "optimizer"))
    return f"| {name} | {num_ranks} | {parts} | {max(held) / 1e6:.2f} | {max(planned) / 1e6:.2f} | {100 * off:.2f} % |"


def _sent_rows(name: str, values: list[dict[str, Any]]) -> Iterator[str]:
    keys = sorted({key for value in values for key in value["sent by formula"]})
    for key in keys:
        counted, planned = ([value[kind].get(key, 0) for value in values] for kind in ("sent", "sent by formula"))
        off = max((abs(a / b - 1) for a, b in zip(counted, planned, strict=True) if b), default=0.0)
        yield f"| {name} | {key} | {max(counted) / 1e6:.3f} | {max(planned) / 1e6:.3f} | {100 * off:.1f} % |"


def put_table(page: Path, name: str, rows: list[str]) -> None:
    """Put rows between the page's marks of a table."""
    text = page.read_text(encoding="utf-8")
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    before, _, rest = text.partition(begin)
    after = rest.partition(end)[2]
    with atomic_write(page) as file:
        file.write((before + begin + "\n".join(rows) + "\n" + end + after).encode())


def main() -> int:
    """Write the tables; exit code 1 where a rank holds 5 % more or less than the formula says."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scaling", description=(__doc__ or "").partition(",")[0])
    parser.add_argument("--paper", action="store_true", help="only what is computed")
    parser.add_argument("--deepspeed", action="store_true", help="only what DeepSpeed holds, which has to be installed")
    wanted = parser.parse_args()
    date = datetime.datetime.now(datetime.UTC).date().isoformat()
    where = f"{date}, {this_machine()}, gloo"
    held = [
        "| kind | ranks | weights, gradients, optimizer MB | a rank MB | formula MB | off |",
        "|---|---|---|---|---|---|",
    ]
    if wanted.deepspeed:
        rows = list(zero_rows())
        put_table(PAGE, "zero", [f"{where}, deepspeed {metadata.version('deepspeed')}:", "", *held, *rows])
        return _is_off(rows)
    put_table(PAGE, "paper", list(paper_rows()))
    if wanted.paper:
        return 0
    found = list(measured_rows())
    put_table(PAGE, "held", [f"{where}:", "", *held, *(row for row, _ in found)])
    sent = ["| kind | dimension, message | counted MB | formula MB | off |", "|---|---|---|---|---|"]
    put_table(PAGE, "sent", [f"{where}:", "", *sent, *(row for _, row in found)])
    return _is_off([row for row, _ in found])


def _is_off(rows: list[str]) -> int:
    return int(any(float(row.split("|")[-2].rstrip("% ")) > 5 for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())

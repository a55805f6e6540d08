"""Which shape of `groundup init`'s ladder reads held-out text best after so many minutes: what its rule rests on.

    python -m benchmarks.shapes [--minutes 1 3] [--hidden 96 128 192 256]

Each run times a few steps and trains as many as fit, as the recipe of `groundup init` would. Finished runs stand in a
journal and are not made again.
"""

import argparse
import json
import statistics
import sys

from groundup.base.machine import prepare_process

prepare_process()

import numpy as np  # noqa: E402

from benchmarks import material  # noqa: E402
from benchmarks.sides import train_ours  # noqa: E402
from benchmarks.time_to_quality import BATCH_TOKENS, PROBE_STEPS, ROW_LENGTH, WARM_STEPS, measured  # noqa: E402
from benchmarks.turns import Figures, measure_in_turn, run_worker  # noqa: E402
from groundup.data.packing import PackedDocuments  # noqa: E402
from groundup.stages.starter import LADDER, shape_of  # noqa: E402
from groundup.train.config import TrainConfig  # noqa: E402

JOURNAL = material.FOLDER / "shapes.jsonl"


def ours(wanted: argparse.Namespace) -> Figures:
    """One run of a shape."""
    work = material.prepared(wanted.source, wanted.vocab)
    shape = shape_of(wanted.hidden, dict(LADDER)[wanted.hidden], wanted.vocab)
    source = PackedDocuments(material.store_of(work, "train"), row_length=ROW_LENGTH, seed=wanted.seed)

    def config(num_steps: int) -> TrainConfig:
        sizes = {"row_length": ROW_LENGTH, "batch_size_tokens": BATCH_TOKENS, "duration": f"{num_steps} steps"}
        rates = {"lr": "auto", "muon_lr": "auto", "muon_weight_decay": "auto", "schedule": "linear"}
        return TrainConfig.model_validate(sizes | rates)

    _, timing = train_ours(config(PROBE_STEPS), shape, source, seed=wanted.seed)
    a_step = statistics.median(np.diff([line["elapsed_seconds"] for line in timing])[WARM_STEPS:])
    model, timing = train_ours(config(max(20, int(60 * wanted.minutes / a_step))), shape, source, seed=wanted.seed)
    figures = measured(model, work, wanted, timing[-1]["elapsed_seconds"], len(timing))
    tokens, parameters = len(timing) * BATCH_TOKENS, model.num_parameters()
    return figures | {"parameters": parameters, "tokens_a_parameter": tokens / parameters}


def main() -> int:
    """Make the runs that the journal lacks, and print all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, nargs="+", default=[1.0, 3.0])
    parser.add_argument("--hidden", type=int, nargs="+", default=[64, 96, 128, 192, 256])
    parser.add_argument("--source", default=material.default_source())
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--worker", choices=("ours",))
    wanted = parser.parse_args()
    if wanted.worker:
        wanted.minutes, wanted.hidden, wanted.shape, wanted.lr = wanted.minutes[0], wanted.hidden[0], "", 0.0
        run_worker({"ours": ours}, wanted)
        return 0
    material.prepared(wanted.source, wanted.vocab)
    done = [json.loads(line) for line in JOURNAL.read_text().splitlines()] if JOURNAL.exists() else []
    for minutes in wanted.minutes:
        for hidden in wanted.hidden:
            run = {"minutes": minutes, "hidden": hidden, "seed": wanted.seed}
            name = run | {"source": wanted.source, "vocab": wanted.vocab}
            found = next((entry["figures"] for entry in done if entry["run"] == name), None)
            if found is None:
                options = [part for key, value in name.items() for part in (f"--{key}", str(value))]
                command = ["benchmarks.shapes", "--worker", "ours", *options]
                found = measure_in_turn({"run": command}, 1)["run"][0]
                with JOURNAL.open("a") as file:
                    file.write(json.dumps({"run": name, "figures": found}) + "\n")
            print(
                f"{minutes:4g} min  {hidden:4} wide  {found['parameters'] / 1e6:5.2f} M  {found['steps']:6} steps  "
                f"{found['tokens_a_parameter']:6.2f} tokens a parameter  {found['bits_per_byte']:.4f} bits per byte",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())

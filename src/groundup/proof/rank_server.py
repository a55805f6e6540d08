"""Ranks over gloo that wait for work, so that torch is not imported anew for each trial on ranks.

`python -m groundup.proof.rank_server RANK SIZE MEET` is one of them; MEET is a file. One JSON line in: the name of a
module, or a file, and of a function in it, and its arguments. One JSON line out: what the function returned for
(world, *arguments), or the line of the error it raised.
"""

import importlib
import importlib.util
import json
import logging
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any, Self

PATIENCE = timedelta(seconds=60)


class RankGroup:
    """So many ranks; a context, at whose end they leave."""

    def __init__(self, meet: Path, num_ranks: int = 2) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
        self._ranks = [
            subprocess.Popen(
                [sys.executable, "-m", __name__, str(rank), str(num_ranks), str(meet)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=environment,
            )
            for rank in range(num_ranks)
        ]

    def run(self, where: object, name: str, *arguments: Any) -> list[dict[str, Any]]:
        """The answer of each rank, `value` or `error` in it. Raises RuntimeError if a rank ended."""
        for rank in self._ranks:
            if rank.stdin is not None:
                rank.stdin.write(json.dumps([str(where), name, arguments]) + "\n")
                rank.stdin.flush()
        answers = ["" if rank.stdout is None else rank.stdout.readline() for rank in self._ranks]
        if "" in answers:
            raise RuntimeError(f"rank {answers.index('')} ended in the middle of {name}")
        return [json.loads(answer) for answer in answers]

    def close(self) -> None:
        """End all."""
        for rank in self._ranks:
            for pipe in (rank.stdin, rank.stdout):
                if pipe is not None:
                    pipe.close()
            rank.kill()
            rank.wait(10)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _module(where: str) -> ModuleType:
    """A module by its name, or a file of functions."""
    if not where.endswith(".py"):
        return importlib.import_module(where)
    if where not in sys.modules:
        spec = importlib.util.spec_from_file_location("work", where)
        if spec is None or spec.loader is None:
            raise ImportError(where)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        sys.modules[where] = module
    return sys.modules[where]


def _serve(rank: int, size: int, meet: str) -> None:
    import torch
    import torch.distributed as dist

    from groundup.base.errors import GroundupError
    from groundup.parallel.world import World

    torch.set_num_threads(1)
    logging.getLogger("torch.distributed.tensor").setLevel(logging.ERROR)  # what is slow among ranks is no news here
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=size, timeout=PATIENCE)
    for line in sys.stdin:
        where, name, arguments = json.loads(line)
        try:
            answer = {"value": getattr(_module(where), name)(World(rank, size, num_local=size), *arguments)}
        except GroundupError as error:
            answer = {"error": error.line()}
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])

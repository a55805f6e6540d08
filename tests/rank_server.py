"""One of several ranks that wait for work, so that tests do not import torch anew for each of them.

Arguments: rank, size, the file at which they meet. One JSON line in: file and name of a function, its arguments. One
JSON line out: what it returned, or the line of the error it raised.
"""

import importlib.util
import json
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from groundup.base.errors import GroundupError
from groundup.parallel.world import World

torch.set_num_threads(1)
RANK, SIZE, MEET = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
dist.init_process_group("gloo", init_method=f"file://{MEET}", rank=RANK, world_size=SIZE, timeout=timedelta(seconds=60))

modules = {}
for line in sys.stdin:
    path, name, arguments = json.loads(line)
    if path not in modules:
        spec = importlib.util.spec_from_file_location("work", path)
        modules[path] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(modules[path])
    try:
        answer = {"value": getattr(modules[path], name)(World(RANK, SIZE, num_local=SIZE), *arguments)}
    except GroundupError as error:
        answer = {"error": error.line()}
    print(json.dumps(answer), flush=True)

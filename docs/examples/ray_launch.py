"""Ray: a task on each of several machines, which starts that machine's ranks. `python ray_launch.py RECIPE [NODES] [GPUS]`"""

import subprocess
import sys

import ray
from ray.util.placement_group import placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

PORT = 29_500


@ray.remote
def address() -> str:
    """Of the machine this runs on."""
    return ray.util.get_node_ip_address()


@ray.remote
def launch(recipe: str, node_rank: int, nodes: int, gpus: int, head: str) -> int:
    """Start this machine's ranks and wait for them."""
    command = ["groundup", "launch", recipe, "--runs-dir", "/shared/runs", "--nproc", str(gpus), "--nnodes", str(nodes)]
    return subprocess.run([*command, "--node-rank", str(node_rank), "--rdzv-endpoint", f"{head}:{PORT}"]).returncode


def main(recipe: str, nodes: int = 2, gpus: int = 8) -> int:
    """The largest exit code of the machines."""
    ray.init()
    group = placement_group([{"GPU": gpus, "CPU": gpus}] * nodes, strategy="STRICT_SPREAD")
    ray.get(group.ready())
    places = [PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=number) for number in range(nodes)]
    head = ray.get(address.options(scheduling_strategy=places[0], num_cpus=1).remote())
    tasks = [
        launch.options(scheduling_strategy=place, num_gpus=gpus, num_cpus=gpus).remote(
            recipe, number, nodes, gpus, head
        )
        for number, place in enumerate(places)
    ]
    return max(ray.get(tasks))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1], *map(int, sys.argv[2:])))

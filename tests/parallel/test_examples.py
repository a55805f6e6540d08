"""The files of docs/examples: their commands are ones that this version understands."""

import ast
import inspect
import re
import shlex
from pathlib import Path

import pytest
import yaml

from groundup.cli import launch
from groundup.parallel.slurm import sbatch_script

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
OPTIONS = {f"--{name.replace('_', '-')}" for name in inspect.signature(launch).parameters}


def assert_understood(command: list[str]) -> None:
    assert command[:2] == ["groundup", "launch"], command
    given = [part for part in command if part.startswith("--")]
    assert given and set(given) <= OPTIONS, command


def test_the_page_names_every_file():
    page = (EXAMPLES / "README.md").read_text()
    files = {path.name for path in EXAMPLES.iterdir()} - {"README.md"}
    assert files == set(re.findall(r"^\| `([^`]+)`", page, re.MULTILINE)) and len(files) == 4


def test_the_job_for_slurm_is_what_launch_prints():
    script = sbatch_script("recipe", ["run", "recipe.yaml"], num_nodes=2, ranks_per_node=8, has_gpus=True)
    assert (EXAMPLES / "slurm.sbatch").read_text() == script
    (started,) = re.findall(r"bash -c (.+)$", script, re.MULTILINE)
    assert_understood(shlex.split(shlex.split(started)[0].removeprefix("exec ")))


def test_skypilot_starts_a_launcher_on_every_machine():
    job = yaml.safe_load((EXAMPLES / "skypilot.yaml").read_text())
    (command,) = [line for line in job["run"].splitlines() if "groundup" in line]
    assert_understood(shlex.split(command))
    assert {"num_nodes", "resources", "setup", "run"} <= job.keys() and job["num_nodes"] == 2


def test_kubeflow_starts_torchrun():
    job = yaml.safe_load((EXAMPLES / "kubeflow-trainjob.yaml").read_text())
    trainer = job["spec"]["trainer"]
    assert (job["kind"], job["spec"]["runtimeRef"]["name"]) == ("TrainJob", "torch-distributed")
    assert trainer["command"][0] == "torchrun" and trainer["command"][-2:] == ["-m", "groundup"]
    assert trainer["args"][0] == "run" and trainer["numNodes"] == 2 and trainer["numProcPerNode"] == 8


def test_ray_starts_a_launcher_on_every_machine():
    tree = ast.parse((EXAMPLES / "ray_launch.py").read_text())
    words = [node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    given = {word for word in words if word.startswith("--")}
    assert given and given <= OPTIONS and "launch" in words


@pytest.mark.parametrize("name", ["kubeflow-trainjob.yaml", "skypilot.yaml", "ray_launch.py"])
def test_the_runs_lie_where_all_machines_see_them(name):
    assert "/shared/runs" in (EXAMPLES / name).read_text()

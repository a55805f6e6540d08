"""`groundup launch`: how many processes, who starts them, and what is said when it cannot be. Two nodes are two agents here."""

import json
import os
import re
import shlex
import socket
import subprocess
import sys

import pytest

from groundup.base.errors import ConfigError
from groundup.cli import main
from groundup.parallel.slurm import sbatch_script, submit
from groundup.stages.spread_run import plan_launch

RECIPE = """
corpus: {source: data.txt, max_piece_bytes: 99}
tokenizer: {vocab_size: 259}
model: {hidden_size: 16, intermediate_size: 32, num_hidden_layers: 2, num_attention_heads: 2, num_key_value_heads: 2}
pretrain: {duration: 4 steps, row_length: 16, batch_size_tokens: 64, device: cpu, precision: fp32}
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """A recipe of a second, in the folder that is the current one."""
    monkeypatch.chdir(tmp_path)
    text = "\n\n".join(f"part {n} has {n * n} words and some more of it" for n in range(60))
    (tmp_path / "data.txt").write_text(text)
    (tmp_path / "r.yaml").write_text(RECIPE)
    return "r.yaml"


def plan(recipe, *, num_local=None, num_nodes=1, max_restarts=None, **parallel):
    overrides = [(f"parallel.{name}", str(value)) for name, value in parallel.items()]
    return plan_launch(["run", recipe], overrides, num_local, num_nodes, max_restarts)


def test_the_recipe_says_how_many_and_the_rest_is_resolved(recipe):
    assert plan(recipe, data_shard=4).parallel.num_ranks == 4
    asked = plan(recipe, num_local=4, num_nodes=2, tensor=2, max_restarts=7)
    assert asked.parallel.degrees["data_replicate"] == 4 and asked.parallel.num_ranks == 8
    assert asked.ranks_per_node == 4 and asked.parallel.max_restarts == 7
    assert plan(recipe, num_nodes=2, data_replicate=1, data_shard=8).ranks_per_node == 4


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_local": 3, "tensor": 2}, "E-CONFIG-MESH: tensor 2 is 2 ranks or a multiple, and there are 3"),
        ({"num_local": 4, "tensor": 4}, "num_attention_heads=2 is no multiple"),
        ({"num_nodes": 2}, "give --nproc N"),
        ({"num_nodes": 3, "data_replicate": 1, "data_shard": 8}, "give --nproc N"),
        ({"num_local": 0}, "--nproc 0"),
    ],
)
def test_what_cannot_be_is_said_before_anything_starts(recipe, changes, says):
    with pytest.raises(ConfigError) as caught:
        plan(recipe, **changes)
    assert says.lower() in caught.value.line().lower()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--nnodes", "2", "--nproc", "1"], "no place where 2 nodes can meet"),
        (["--nnodes", "2", "--nproc", "1", "--rdzv-endpoint", "host"], "no place where 2 nodes can meet"),
        (["--nnodes", "2", "--nproc", "1", "--rdzv-endpoint", "host:1", "--node-rank", "2"], "--node-rank 2 of"),
        (["--rdzv-endpoint", "host:1"], "for several machines"),
        (["--submit"], "no sbatch"),
    ],
)
def test_a_command_line_that_cannot_be_obeyed_is_exit_2(recipe, capsys, monkeypatch, arguments, says):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit) as stop:
        main(["launch", recipe, *arguments])
    assert stop.value.code == 2 and says in capsys.readouterr().err


def test_the_script_for_sbatch_runs_launch_on_every_node(tmp_path):
    settings = ["run", "my recipe.yaml", "--pretrain.lr", "3e-4", "--name", "it's"]
    script = sbatch_script("r", settings, num_nodes=2, ranks_per_node=8, has_gpus=True)
    assert "#SBATCH --nodes=2\n" in script and "#SBATCH --gpus-per-node=8\n" in script
    alone = sbatch_script("r", settings, num_nodes=1, ranks_per_node=8, has_gpus=False)
    assert "gpus" not in alone and "HEAD" in script and "HEAD" not in alone and "PORT" not in alone
    stand_ins = {
        "scontrol": "echo first; echo second",
        "srun": 'shift; SLURM_NODEID=1 exec "$@"',
        "groundup": f"{shlex.quote(sys.executable)} -c 'import json, sys; print(json.dumps(sys.argv[1:]))' \"$@\"",
    }
    for name, body in stand_ins.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "70042"}
    done = subprocess.run(["bash"], input=script, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [
        *("launch", "my recipe.yaml", "--command", "run", *settings[2:]),
        *("--nproc", "8", "--nnodes", "2", "--node-rank", "1", "--rdzv-endpoint", "first:29542"),
    ]


def test_a_job_is_submitted_and_a_refusal_is_told(tmp_path, monkeypatch):
    sbatch = tmp_path / "sbatch"
    sbatch.write_text("#!/bin/sh\n/bin/cat > $0.got; echo Submitted batch job 7\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert submit("#!/bin/bash\n") == "Submitted batch job 7"
    assert (tmp_path / "sbatch.got").read_text() == "#!/bin/bash\n"
    sbatch.write_text("#!/bin/sh\necho sbatch: error: invalid partition >&2; exit 1\n")
    with pytest.raises(ConfigError, match="E-SLURM: sbatch refuses the job: sbatch: error: invalid partition"):
        submit("#!/bin/bash\n")


def on_two_nodes(folder, *arguments, **variables):
    """Exit code and standard error of two agents with a rank each, that of the end point first."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-P", "-m", "groundup", "launch", "r.yaml", "--nproc", "1", "--nnodes", "2"]
    command += ["--rdzv-endpoint", f"localhost:{port}", *arguments]
    nodes = [
        subprocess.Popen(
            [*command, "--node-rank", str(node)],
            cwd=folder,
            env=os.environ | variables,
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            text=True,
        )
        for node in range(2)
    ]
    said = [node.communicate(timeout=200)[1] for node in nodes]
    return [(node.returncode, text) for node, text in zip(nodes, said, strict=True)]


@pytest.mark.end_to_end
def test_two_nodes_train_one_run_and_begin_again_when_a_rank_is_lost(recipe, tmp_path):
    failpoint = {"GROUNDUP_FAILPOINT": "comm.pre:kill:3:1"}
    (code, said), (other, also) = on_two_nodes(tmp_path, "--max-restarts", "0", **failpoint)
    assert (code, other) == (6, 6), said + also
    assert re.fullmatch(r"ERROR E-RANK-LOST: rank 1 \(pid \d+\) signal 9\. .*", also.splitlines()[-1])
    assert said.splitlines()[-1].startswith("ERROR E-RANK-GONE")
    (code, said), (other, also) = on_two_nodes(tmp_path, "--restart")
    assert (code, other) == (0, 0), said + also
    summary = json.loads((tmp_path / "runs/r/pretrain/summary.json").read_text())
    assert summary["num_parameters"] > 0 and "2 ranks" not in said


@pytest.mark.slow
@pytest.mark.end_to_end
def test_the_cause_is_the_last_line_and_its_code_the_exit_code(recipe, tmp_path):
    (code, said), (other, also) = on_two_nodes(tmp_path, "--max-restarts", "0", "--corpus.source", "nowhere.txt")
    assert code == 3 and said.splitlines()[-1].startswith("ERROR E-"), said
    assert other in (3, 6), also

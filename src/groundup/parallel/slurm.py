"""A run as a Slurm job: the script that sbatch takes. Every node runs `groundup launch`, the first one's host is the meeting place."""

import shlex
import shutil
import subprocess
from collections.abc import Sequence

from groundup.base.errors import ConfigError

PORT = 29_500
SECONDS_TO_SAVE = 120
"""Before the time limit the ranks are asked to save and stop."""


def sbatch_script(name: str, arguments: Sequence[str], *, num_nodes: int, ranks_per_node: int, has_gpus: bool) -> str:
    """The script, to be submitted from the folder that the recipe's paths start from.

    `arguments` are a command of groundup, the recipe, and settings.
    """
    command, recipe, *settings = arguments
    where = f"--nproc {ranks_per_node}"
    if num_nodes > 1:
        where += f' --nnodes {num_nodes} --node-rank "$SLURM_NODEID" --rdzv-endpoint "$HEAD:$PORT"'
    started = f"exec groundup launch {shlex.join([recipe, '--command', command, *settings])} {where}"
    gpus = [f"#SBATCH --gpus-per-node={ranks_per_node}"] if has_gpus else []
    meeting = [
        'export HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        f"export PORT=$(({PORT} + SLURM_JOB_ID % 1000))",
    ]
    lines = [
        "#!/bin/bash",
        f"#SBATCH --job-name={name}",
        f"#SBATCH --nodes={num_nodes}",
        "#SBATCH --ntasks-per-node=1",
        *gpus,
        f"#SBATCH --output={name}-%j.log",
        f"#SBATCH --signal=TERM@{SECONDS_TO_SAVE}",
        "#SBATCH --requeue",
        "",
        *(meeting if num_nodes > 1 else []),
        f"srun --kill-on-bad-exit=1 bash -c {shlex.quote(started)}",
    ]
    return "\n".join(lines) + "\n"


def submit(script: str) -> str:
    """Hand a script to sbatch; returns what it says. Raises ConfigError where there is no sbatch, or it refuses."""
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        raise ConfigError(
            "E-SLURM", what="no sbatch on this machine", next="run this on a login node, or print the job with --slurm"
        )
    done = subprocess.run([sbatch], input=script, capture_output=True, text=True)
    if done.returncode:
        reason = " ".join(done.stderr.split()) or f"exit code {done.returncode}"
        raise ConfigError("E-SLURM", what=f"sbatch refuses the job: {reason}", next="print it with --slurm and mend it")
    return done.stdout.strip()

"""What trials are made on: a whole way of seconds, and the server that forks them."""

import shutil

import pytest
import yaml

from groundup.base.log import Log
from groundup.proof.kill_trials import KillTrials
from groundup.proof.trial_client import Trials
from groundup.proof.trial_recipe import write_trial_data
from groundup.stages.recipe import load_recipe


@pytest.fixture(scope="session")
def trials():
    """The server; its processes may be killed."""
    with Trials() as server:
        assert server.forks, "something started a thread before the fork"
        yield server


@pytest.fixture(scope="session")
def engine(trials, tmp_path_factory):
    """A way whose every stage ran once, undisturbed."""
    folder = tmp_path_factory.mktemp("trials")
    made = KillTrials(load_recipe(str(write_trial_data(folder))), folder / "runs", trials, seed=1)
    made.prepare()
    return made


@pytest.fixture(scope="session")
def engine_on_ranks(trials, engine, tmp_path_factory):
    """The same way, its training stages on two ranks."""
    made = KillTrials(engine.recipe, tmp_path_factory.mktemp("ranks") / "runs", trials, seed=5, num_ranks=2)
    shutil.copytree(engine.fresh_run("pretrain", "shared"), made.unbroken)
    made.prepare()
    return made


@pytest.fixture
def write_recipe(tmp_path):
    """Writes sections as a recipe file."""

    def write(sections, name="case.yaml"):
        path = tmp_path / name
        path.write_text(yaml.safe_dump(sections))
        return path

    return write


@pytest.fixture
def quiet():
    return Log(quiet=True)

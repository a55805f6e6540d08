"""The diagnosis on runs that are really trained: two faults and a sound one, as `benchmarks/diagnosis.py` makes them."""

import pytest

from benchmarks.diagnosis import PAGE, judged, made, prepared
from benchmarks.pathologies import Trial, everywhere, faults, healthy, in_training, random_labels, sees_labels
from groundup.report.diagnosis.rules import RULES

pytestmark = pytest.mark.costly
SHORT = {"duration": "90 steps", "lr": "auto", "muon_lr": "auto"}
TRUE_OF_ALL = {"few-tokens", "small-validation"}
"""What holds for every run of seconds on a few kilobytes."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made_in = tmp_path_factory.mktemp("diagnosis")
    prepared(made_in, "few")
    return made_in


def test_a_sound_run_gets_no_name_but_those_true_of_it(folder):
    trial = Trial("sound", "", SHORT, text="few")
    assert set(judged(trial, made(trial, 0, folder, 0))[1]) <= TRUE_OF_ALL


@pytest.mark.parametrize(
    ("expected", "plant"), [("leak", everywhere(sees_labels)), ("stuck-at-uniform", in_training(random_labels))]
)
def test_a_planted_fault_is_named(expected, plant, folder):
    trial = Trial(expected, expected, SHORT, text="few", plant=plant)
    is_right, names = judged(trial, made(trial, 0, folder, 0))
    assert is_right, names


def test_every_symptom_is_planted_and_a_dozen_runs_are_healthy():
    assert {trial.expected for trial in faults(0, end_of_turn=0)} == RULES.keys()
    assert len(healthy(0)) >= 12


def test_the_page_names_every_symptom():
    page = PAGE.read_text(encoding="utf-8")
    assert all(f"| `{name}` |" in page for name in RULES)

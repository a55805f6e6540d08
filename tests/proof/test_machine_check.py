"""`groundup doctor`: the machine in words."""

import re
import tomllib
from pathlib import Path

from groundup.base import machine
from groundup.base.amounts import counted
from groundup.cli import main
from groundup.proof import machine_check
from groundup.proof.machine_check import EXTRAS, machine_facts

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


def test_every_fact_has_a_line(capsys):
    main(["doctor"])
    lines = capsys.readouterr().out.splitlines()
    names = ["system", "processor", "instructions", "memory", "disk", "compiler", "CUDA", "auto", "packages"]
    for name, line in zip([*names, *(f"extra {extra}" for extra in EXTRAS)], lines, strict=False):
        assert re.match(rf"  {name} +\S", line), line
    assert "doctor numerics" in lines[-1]


def test_figures_are_the_machine_s():
    facts = machine_facts()
    total, free = map(float, re.findall(r"[\d.]+", facts["memory"]))
    assert abs(total - machine.memory_bytes() / 2**30) < 0.1 and 0 < free <= total
    assert counted(machine.num_cores(), "core") in facts["processor"]
    assert "torch " in facts["packages"]


def test_what_is_missing_is_said_with_what_it_costs(monkeypatch):
    monkeypatch.setattr(machine, "cpu_flags", lambda: frozenset({"avx2"}))
    monkeypatch.setattr(machine, "compiler", lambda: None)
    monkeypatch.setitem(EXTRAS, "dev", ("tests", ("pytest", "no-such-package")))
    facts = machine_facts()
    assert facts["instructions"] == "AVX2: no products in bf16: training is in fp32"
    assert facts["compiler"].startswith("none") and "g++" in facts["compiler"]
    assert facts["extra dev"] == "missing no-such-package; for tests: pip install 'groundup[dev]'"
    if not machine_check.torch.cuda.is_available():
        assert "precision fp32, attention sdpa" in facts["auto"] and facts["CUDA"].startswith("no device")


def test_the_extras_are_those_of_the_project():
    declared = tomllib.loads(PYPROJECT.read_text())["project"]["optional-dependencies"]
    assert declared.keys() == EXTRAS.keys()
    for extra, (_, packages) in EXTRAS.items():
        assert set(packages) <= {re.match(r"[\w.-]+", requirement)[0] for requirement in declared[extra]}

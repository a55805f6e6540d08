"""The script for a CUDA device, tried on a CPU: what it passes over, what it makes, and that a fault makes it fail."""

import pytest
import torch

from benchmarks import gpu_checks, gpu_kernels, gpu_runs
from groundup.model.makers import MAKERS

pytestmark = pytest.mark.costly


@pytest.fixture
def run(capsys):
    """Runs the script; its exit code and lines, the last of which counts them."""

    def main(*arguments):
        code = gpu_checks.main(list(arguments))
        return code, capsys.readouterr().out.splitlines()

    return main


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_every_check_is_passed_over(run):
    code, lines = run()
    assert code == 0 and len(lines) == len(gpu_checks.CHECKS) + 1
    assert all(line.startswith("SKIP ") and line.endswith(": no CUDA device") for line in lines[:-1])


@pytest.mark.slow
def test_a_cpu_makes_what_it_can(run):
    code, lines = run("--device", "cpu")
    passed = {line[5:47].strip() for line in lines if line.startswith("PASS")}
    assert code == 0, "\n".join(lines)
    assert passed == {
        *(f"attention sdpa {dtype}{window}" for dtype in ("bfloat16", "float32") for window in ("", ", window 50")),
        "experts grouped = looped",
        *(f"{name} = CPU" for name in gpu_checks.OPTIMIZERS),
        *(f"{what} of {maker}{end}" for what, end in (("NF4", " = unpacked"), ("training QLoRA", ""))
          for maker in ("torchao", "bitsandbytes")),
        *("training fp32", "training experts"),
        *(f"model: {claim}" for claim in gpu_checks.PROOFS if "varlen" not in claim and "flex" not in claim),
    }  # fmt: skip


def one_token_late(honest):
    return lambda first, *rest: honest(first.roll(1, -2), *rest)


@pytest.mark.parametrize(
    ("name", "owner", "key"),
    [
        ("attention sdpa float32", MAKERS, "sdpa"),
        ("experts grouped", gpu_kernels, "grouped_product"),
    ],
)
def test_a_planted_fault_fails(run, monkeypatch, name, owner, key):
    if isinstance(owner, dict):
        monkeypatch.setitem(owner, key, one_token_late(owner[key]))
    else:
        monkeypatch.setattr(owner, key, one_token_late(getattr(owner, key)))
    code, lines = run("--device", "cpu", "--only", name)
    assert code == 5 and len(lines) > 1 and all(line.startswith("FAIL") for line in lines[:-1]), lines


def test_an_optimizer_that_strays_and_a_run_that_does_not_learn_fail(run, monkeypatch):
    honest = gpu_kernels.build_optimizers

    def other_betas(parameters, config):
        return honest(parameters, config.model_copy(update={"betas": (0.8, 0.95)}))

    monkeypatch.setattr(gpu_kernels, "build_optimizers", other_betas)
    assert run("--device", "cpu", "--only", "fused AdamW")[0] == 5
    monkeypatch.setattr(gpu_runs, "STEPS", 1)
    assert run("--device", "cpu", "--only", "training experts")[0] == 5


def test_a_check_that_breaks_off_fails_and_the_others_are_made(run, monkeypatch):
    def broken(device):
        raise RuntimeError("CUDA error: an illegal\nmemory access")

    first, second = gpu_checks.Check("first", broken), gpu_checks.Check("second", gpu_kernels.grouped_experts)
    monkeypatch.setattr(gpu_checks, "CHECKS", (first, second))
    code, lines = run("--device", "cpu")
    assert code == 5 and lines[0] == "FAIL first: RuntimeError: CUDA error: an illegal memory access"
    assert lines[1].startswith("PASS second") and lines[2] == "1 FAIL  1 PASS"


def test_a_missing_extra_is_said(run, monkeypatch):
    found = gpu_kernels.importlib.util.find_spec
    monkeypatch.setattr(
        gpu_kernels.importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "bitsandbytes" else found(name, *rest),
    )
    code, lines = run("--device", "cpu", "--only", "NF4 of bitsandbytes")
    assert code == 0 and lines[0].startswith("SKIP NF4 of bitsandbytes = unpacked: bitsandbytes is not installed")

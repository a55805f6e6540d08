"""Moving averages in a run: what is looked at, what is given back, what is saved."""

import json

import pytest
import torch

from groundup.train.run import TrainingRun
from groundup.train.validation import validation_figures

pytestmark = pytest.mark.costly

SHORT = {"duration": "5 steps", "ema_decay": 0.9, "validate_every": "2 steps"}


def look(run, weights):
    """Validation loss of some weights."""
    model = run.job.model
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights[name])
    figures = validation_figures(
        model, run.job.validation["text"], max_rows=64, micro_batch_rows=2, device="cpu", token_bytes=None
    )
    return figures["loss"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_looks_and_the_final_model_are_the_averages(make_job, precision):
    settings = SHORT | {"precision": precision}
    seen = []
    job = make_job("run", sample=lambda model, prompt: seen.append(dict(model.named_parameters())) or "",
                   sample_every="5 steps", sample_prompts=("x",), **settings)  # fmt: skip
    run = TrainingRun(job)
    outcome = run.run()
    plain = make_job("plain", **settings | {"ema_decay": None})
    trained = TrainingRun(plain).run()
    averages = run.engine.average.tensors
    weights = {name: weight.clone() for name, weight in run.engine.weights.items()}
    assert all(torch.equal(outcome.weights[name], averages[name]) for name in weights)
    assert all(torch.equal(trained.weights[name], weights[name]) for name in weights), "training itself is the same"
    assert not any(torch.equal(outcome.weights[name], weights[name]) for name in weights)
    assert all(torch.equal(seen[0][name].float(), averages[name].to(seen[0][name].dtype).float()) for name in averages)
    last = json.loads((job.folder / "metrics.jsonl").read_text().splitlines()[-1])["val"]["text"]["loss"]
    assert last == look(run, averages) != look(run, weights)


def test_a_save_in_the_middle_of_a_look_keeps_the_weights(make_job):
    run = TrainingRun(make_job("run", **SHORT))
    run.run()
    before = {name: weight.clone() for name, weight in run.engine.state_dict()["model"].items()}
    with run.engine.with_final_weights():
        saved = run.engine.state_dict()
    assert all(torch.equal(saved["model"][name], before[name]) for name in before)
    assert not any(torch.equal(saved["ema"][name], before[name]) for name in before)


def test_averages_that_are_asked_for_later_begin_with_the_weights(make_job):
    TrainingRun(make_job("run", **SHORT | {"ema_decay": None, "duration": "3 steps"})).run()
    later = TrainingRun(make_job("run", **SHORT))
    assert later.state.step == 3 and later.engine.average.num_updates == 0
    weights = later.engine.weights
    assert all(torch.equal(later.engine.average.tensors[name], weights[name]) for name in weights)
    later.run()
    assert later.engine.average.num_updates == 2
    # and those that are no longer asked for are left aside
    assert TrainingRun(make_job("run", **SHORT | {"ema_decay": None})).engine.average is None

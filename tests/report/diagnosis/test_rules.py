"""Every symptom is named by what its files show, and a healthy run has none."""

import math

import pytest
from report.diagnosis.conftest import NUM_STEPS, VOCAB_SIZE, falling

from groundup.report.diagnosis.rules import RULES
from groundup.report.diagnosis.words import diagnosis_lines
from groundup.report.page import render
from groundup.report.read import read_run

UNIFORM = math.log(VOCAB_SIZE)


def event(kind, step, detail):
    return {"step": step, "kind": kind, "detail": detail}


def diverges(run):
    run.set_loss(lambda step: falling(step) + (0 if step < 120 else min(2.5, 0.1 * (step - 120))))


def not_finite(run):
    run.events.append(event("nonfinite", 90, "stop: loss nan in a batch of 3 documents: a.py byte 0"))
    run.folder = run.folder / ".attempts"  # the stage was not finished
    run.write()
    run.folder = run.folder.parent
    (run.folder / ".attempts" / "recipe.yaml").rename(run.folder / "recipe.yaml")


def rate_too_high(run):
    run.set_rate(20)
    run.set_loss(lambda step: 5.4 - 0.1 * step / NUM_STEPS - (1.2 * max(0, step - 120) / 80))


def rate_too_low(run):
    run.set_rate(0.02)
    run.set_loss(lambda step: UNIFORM - 0.004 * step)


def no_warmup(run):
    run.resolved["warmup_steps"] = 0
    run.set_loss(lambda step: falling(step) + 1.5 * math.exp(-(((step - 6) / 4) ** 2)))


def stuck(run):
    run.set_loss(lambda step: UNIFORM)


def swings(run):
    run.set_loss(lambda step: falling(step) + 0.5 * (step // 12 % 2))


def small_batch(run):
    run.settings["batch_size_tokens"] = 64
    for line in run.metrics:
        line["loss"] = 4.0 + (1.0 if line["step"] * 7919 % 5 < 2 else -1.0) * (0.5 + line["step"] * 31 % 7 / 7)
        line.pop("val", None)
    run.metrics[0]["loss"] = UNIFORM


def spikes(run):
    run.events.append(
        event("spike", 120, "warn: loss 9 is 30 deviations above in a batch of 2 documents: bad.py byte 7")
    )


def spikes_unnamed(run):
    run.metrics[130]["loss"] += 4


def flat(run):
    run.set_loss(lambda step: 4.5 + 1.7 * math.exp(-step / 8))


def learns_by_heart(run):
    run.set_loss(falling, validation=lambda step: 4.0 + 0.004 * abs(step - 80))


def gains_by_heart_alone(run):
    """Validation neither falls nor clearly rises while the training loss goes on falling over text that was read before."""
    run.set_loss(
        lambda step: 6.2 - 0.02 * step, validation=lambda step: max(4.6, 6.2 - 0.02 * step) + 0.0004 * max(0, step - 80)
    )
    for line in run.metrics:
        line["epoch"] = line["step"] / 30


def repeats(run):
    for line in run.metrics:
        line["epoch"] = line["step"] / 10


def leaks(run):
    run.set_loss(lambda step: 6.2 * math.exp(-step / 15) + 0.02)


def differs(run):
    run.set_loss(falling, validation=lambda step: falling(step) + 2.0)


def summed(run):
    run.set_loss(lambda step: 4 * falling(step), validation=lambda step: 4 * falling(step))


def without_labels(run):
    run.events.append(event("skip", 12, "no supervised token"))


def half_masked(run):
    for line in run.metrics:
        line["num_loss_tokens"] = 250


def few_rows(run):
    run.settings["max_validation_rows"] = 4


def few_chats(run):
    run.ledger["validation"] = 3


def too_large(run):
    run.summary["num_parameters"] = 5_000_000
    run.set_rate(0.09)  # the law's for that size


def waits(run):
    for line in run.timing:
        line["data_seconds"] = 0.03


def creeps(run):
    for line in run.timing:
        line["peak_memory_bytes"] += 1_000_000 * line["step"]


def slow_rank(run):
    run.events.append(event("straggler", 16, "rank 1 computes 3.1x the median of the others; all wait for it"))


def overflows(run):
    for line in run.metrics:
        line["overflow_steps"] = line["step"] // 5


def dead(run):
    for line in run.metrics:
        line["expert_load"] = [[170, 170, 170, 2], [128, 128, 128, 128]]


def clipped(run):
    run.settings["max_grad_norm"] = 0.05


def forgets(run):
    run.summary |= {"audit_base_bits_per_byte_before": 2.0}
    for line in run.metrics:
        if "val" in line:
            line["audit"] = {"base_bits_per_byte": 2.0 + line["step"] / 200, "stop_rate": 1.0}


def never_stops(run):
    run.summary["stop_rate"] = 0.1


PRETRAINING = {
    "diverged": [diverges, not_finite],
    "lr-too-high": [rate_too_high],
    "lr-too-low": [rate_too_low],
    "warmup-missing": [no_warmup],
    "stuck-at-uniform": [stuck],
    "oscillates": [swings, small_batch],
    "spikes": [spikes, spikes_unnamed],
    "plateau": [flat],
    "over-fits": [learns_by_heart, gains_by_heart_alone],
    "repeated-data": [repeats],
    "leak": [leaks],
    "unlike-losses": [differs],
    "scaled-loss": [summed],
    "masked-rows": [without_labels, half_masked],
    "small-validation": [few_rows],
    "few-tokens": [too_large],
    "loader-bound": [waits],
    "memory-creeps": [creeps],
    "slow-rank": [slow_rank],
    "fp16-overflows": [overflows],
    "dead-experts": [dead],
    "clipped": [clipped],
}
CHATS = {
    "forgets": [forgets],
    "never-stops": [never_stops],
    "small-validation": [few_chats],
    "masked-rows": [without_labels],
}
CASES = [(name, spoil, "pretrain") for name, spoils in PRETRAINING.items() for spoil in spoils]
CASES += [(name, spoil, "sft") for name, spoils in CHATS.items() for spoil in spoils]


def test_every_rule_has_a_case():
    assert {name for name, _, _ in CASES} == RULES.keys()


@pytest.mark.parametrize("stage", ["made", "made_sft"])
def test_a_healthy_run_has_nothing(stage, request):
    assert request.getfixturevalue(stage).names() == []


@pytest.mark.parametrize(
    ("name", "spoil", "stage"), CASES, ids=[f"{name}-{spoil.__name__}" for name, spoil, _ in CASES]
)
def test_symptom_is_named_first_or_second(name, spoil, stage, made, made_sft):
    run = made if stage == "pretrain" else made_sft
    spoil(run)
    found = run.found() if spoil is not not_finite else None
    if found is None:
        from groundup.report.diagnosis.rules import diagnose

        found = diagnose(read_run(run.folder))
    assert name in [each.name for each in found[:2]], [each.name for each in found]
    finding = next(each.finding for each in found if each.name == name)
    assert any(char.isdigit() for char in finding.why), "the figures it follows from"
    assert finding.next and finding.certainty in ("certain", "likely", "possible")
    assert not [
        part for part in (finding.seen, finding.why, finding.next) if "nan" in part.split() and spoil is not not_finite
    ]


def test_nothing_is_learned_by_heart_in_a_first_pass(made):
    gains_by_heart_alone(made)
    assert "over-fits" in made.names()
    for line in made.metrics:
        line["epoch"] = line["step"] / 300
    assert "over-fits" not in made.names()


@pytest.mark.parametrize(("rates", "is_named"), [((1.0, 0.3, 0.2, 0.3), True), ((1.0, 0.3, 0.3, 1.0), False)])
def test_answers_that_stop_at_the_last_look_do_stop(made_sft, rates, is_named):
    looked = [line for line in made_sft.metrics if "val" in line][-len(rates) :]
    for line, rate in zip(looked, rates, strict=True):
        line["audit"] = {"stop_rate": rate}
    assert ("never-stops" in made_sft.names()) == is_named


def test_the_step_to_go_back_to_and_the_documents_are_named(made):
    learns_by_heart(made)
    assert "step 80" in made.found()[0].finding.next
    spikes(made)
    assert any("bad.py byte 7" in each.finding.why for each in made.found())


def test_a_few_steps_are_not_judged_by_their_form(made):
    diverges(made)
    del made.metrics[12:], made.timing[12:]
    assert not {"diverged", "lr-too-high", "plateau"} & set(made.names())


def test_a_run_at_work_without_a_summary_is_diagnosed(made):
    leaks(made)
    made.summary, made.resolved, made.settings = {}, {}, {}
    assert made.names()[0] == "leak"


def test_words_and_page_say_the_same(made):
    leaks(made)
    made.write()
    record = read_run(made.folder)
    lines = "\n".join(diagnosis_lines(record))
    page = render(record)
    assert "(leak, certain)" in lines and "why" in lines and "next" in lines
    assert "the labels leak" in page and 'class="card finding certain"' in page


def test_a_healthy_run_is_told_so(made):
    made.write()
    record = read_run(made.folder)
    assert f"nothing found: {len(RULES)} symptoms" in next(diagnosis_lines(record))
    assert "Nothing found" in render(record)

"""The goals of the quickstart: each is missed where its figure is."""

import pytest

from groundup.stages.quickstart import goals

REACHED = {
    "pretrain": {"bits_per_byte": 1.5, "xz_bits_per_byte": 1.8},
    "sft": {
        "answer_loss": 4.0,
        "answer_loss_before": 6.0,
        "stop_rate": 0.98,
        "mean_answer_length": 50.0,
        "reference_answer_length": 60.0,
        "distinct_answers": 45,
        "num_questions": 50,
    },
    "lora": {
        "skill_rate": 0.9,
        "skill_rate_before": 0.0,
        "bits_per_byte": 1.51,
        "bits_per_byte_before": 1.5,
        "merge_max_logit_difference": 1e-5,
    },
}


def changed(stage, **figures):
    return REACHED | {stage: REACHED[stage] | figures}


def test_all_goals_are_reached_by_good_figures():
    assert all(goal.is_met for goal in goals(REACHED))


@pytest.mark.parametrize(
    ("stage", "figures"),
    [
        ("pretrain", {"bits_per_byte": 1.81}),
        ("sft", {"answer_loss": 5.9}),
        ("sft", {"stop_rate": 0.94}),
        ("sft", {"mean_answer_length": 125.0}),
        ("sft", {"mean_answer_length": 20.0}),
        ("sft", {"distinct_answers": 39}),
        ("lora", {"skill_rate": 0.79}),
        ("lora", {"skill_rate_before": 0.3}),
        ("lora", {"bits_per_byte": 1.54}),
        ("lora", {"merge_max_logit_difference": 2e-4}),
    ],
)
def test_each_missed_figure_misses_one_goal(stage, figures):
    assert [goal.is_met for goal in goals(changed(stage, **figures))].count(False) == 1

"""What a sweep of vocabularies says."""

from groundup.insight.sweep import Swept, sweep_lines


def swept(vocabulary, bits_per_byte, a_token):
    return Swept(vocabulary, 1_000_000 + 64 * vocabulary, 0.1, 500_000, a_token, 500_000 * a_token, 1e13, bits_per_byte)


def test_the_best_is_what_reads_best_not_what_compresses_best():
    lines = list(sweep_lines([swept(1024, 1.70, 2.5), swept(2048, 1.65, 2.9), swept(4096, 1.72, 3.3)]))
    assert lines[2].startswith("  ›     2,048") and "Take 2,048 ids: 1.650 bits per byte" in lines[-1]
    assert "4,096 compress best (3.30 bytes a token) and read 4.2 % worse" in lines[-1]
    assert "would do as well" not in lines[-1] and "try further" not in lines[-1]


def test_what_is_as_good_and_what_was_not_tried_is_said():
    answer = list(sweep_lines([swept(1024, 1.650, 2.5), swept(2048, 1.652, 2.9)]))[-1]
    assert "Take 1,024 ids" in answer and "2,048 would do as well" in answer
    assert "the smallest of those tried" in answer
    answer = list(sweep_lines([swept(1024, 1.75, 2.5), swept(2048, 1.65, 2.9)]))[-1]
    assert "the largest of those tried" in answer and "compress best" not in answer

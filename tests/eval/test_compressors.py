"""What general compressors make of the same bytes."""

import gzip
import lzma

import pytest

from groundup.eval.compressors import compressor_figures

TEXT = "".join(f"line {number} of the text, {number * 7 % 13}\n" for number in range(400)).encode()
TRAINING = "".join(f"line {number} of the text, {number * 5 % 11}\n" for number in range(400, 900)).encode()


def xz(data):
    return len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))


def test_figures_are_the_sizes_of_xz_and_gzip():
    figures = compressor_figures(TEXT, TRAINING)
    assert figures["xz_bits_per_byte"] == 8 * xz(TEXT) / len(TEXT)
    assert figures["gzip_bits_per_byte"] == 8 * len(gzip.compress(TEXT, 9)) / len(TEXT)
    assert figures["xz_primed_bits_per_byte"] == pytest.approx(8 * (xz(TRAINING + TEXT) - xz(TRAINING)) / len(TEXT))
    assert figures["xz_primed_with_bytes"] == len(TRAINING)
    assert figures["xz_primed_bits_per_byte"] < figures["xz_bits_per_byte"] < figures["gzip_bits_per_byte"] * 1.2


def test_nothing_to_compress_or_to_prime_with():
    assert compressor_figures(b"", TRAINING) == {}
    assert set(compressor_figures(TEXT, b"")) == {"xz_bits_per_byte", "gzip_bits_per_byte"}

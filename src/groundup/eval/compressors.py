"""What general compressors make of the same bytes: the measure beside bits per byte."""

import gzip
import lzma

PRESET = 9 | lzma.PRESET_EXTREME


def xz_size(data: bytes) -> int:
    """Bytes of `xz -9e`."""
    return len(lzma.compress(data, format=lzma.FORMAT_XZ, preset=PRESET))


def compressor_figures(text: bytes, training_text: bytes) -> dict[str, float]:
    """Bits per byte of `text` under xz -9e, gzip -9, and xz -9e that has read the training text before."""
    if not text:
        return {}
    size = len(text)
    figures = {
        "xz_bits_per_byte": 8 * xz_size(text) / size,
        "gzip_bits_per_byte": 8 * len(gzip.compress(text, compresslevel=9, mtime=0)) / size,
    }
    if training_text:
        figures["xz_primed_bits_per_byte"] = 8 * (xz_size(training_text + text) - xz_size(training_text)) / size
        figures["xz_primed_with_bytes"] = len(training_text)
    return figures

"""A shuffle without memory: a keyed bijection of 0..n-1, so that row numbers need no table."""

from groundup.base.seeding import derive_seed

ROUNDS = 4
_MASK = (1 << 64) - 1


def _mix(value: int) -> int:
    """A 64-bit finaliser (splitmix64, Steele et al. 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


class Permutation:
    """A Feistel network over the next power of four, walked until the result falls into 0..size-1 (Black & Rogaway 2002)."""

    def __init__(self, size: int, seed: int, *names: object) -> None:
        self.size = size
        self._half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        self._keys = [derive_seed(seed, *names, round_number) for round_number in range(ROUNDS)]

    def __call__(self, index: int) -> int:
        """Where `index` goes."""
        half, low_mask = self._half_bits, (1 << self._half_bits) - 1
        while True:
            left, right = index >> half, index & low_mask
            for key in self._keys:
                left, right = right, left ^ (_mix(right ^ key) & low_mask)
            index = (left << half) | right
            if index < self.size:
                return index

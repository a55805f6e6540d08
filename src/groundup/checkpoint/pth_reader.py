"""The only reader of pickles: a program of its own, run by `groundup convert`, that turns a .pth into safetensors.

It is started without this package's or the user's environment, limits its memory, time and files, asks torch for
tensors only (`weights_only=True`), and writes one file. Nothing here is imported by the rest.

    python -I pth_reader.py SOURCE TARGET
"""

import re
import resource
import sys
from pathlib import Path

LEAST_BYTES = 6 << 30
"""Address space that torch alone takes when it is imported, with room."""
SECONDS = 900
MANY = 100_000
LEAD = re.compile(r"Weights only load failed\.|from a trusted source\.|WeightsUnpickler error:")
"""What torch says before what is wrong."""
ADVICE = ("Please use `torch.serialization", "Check the documentation of torch.load")
"""Where it goes on to tell how the file can be loaded."""


def set_limits(size: int) -> None:
    """Bound address space, processor time, the size of files and their number."""
    limits = {
        resource.RLIMIT_AS: LEAST_BYTES + 8 * size,
        resource.RLIMIT_CPU: SECONDS,
        resource.RLIMIT_FSIZE: 8 * size + (1 << 20),
        resource.RLIMIT_NOFILE: 256,
        resource.RLIMIT_CORE: 0,
    }
    for limit, value in limits.items():
        resource.setrlimit(limit, (value, value))


def read(source: Path) -> object:
    """What the file holds, tensors and plain containers only."""
    import torch

    torch.set_num_threads(1)
    return torch.load(source, map_location="cpu", weights_only=True)


def weights_in(value: object) -> dict[str, object]:
    """The named tensors of a state dict, or of one under `model`. Raises ValueError for anything else."""
    import torch

    if isinstance(value, dict) and isinstance(value.get("model"), dict):
        value = value["model"]
    if not isinstance(value, dict) or not value or len(value) > MANY:
        raise ValueError("not a dictionary of tensors")
    tensors: dict[str, object] = {}
    for name, tensor in value.items():
        if not isinstance(name, str) or type(tensor) not in (torch.Tensor, torch.nn.Parameter):
            raise ValueError(f"{str(name)[:60]!r} is {type(tensor).__name__}, no tensor")
        if tensor.layout != torch.strided or tensor.is_quantized:
            raise ValueError(f"{name[:60]!r} is not a plain tensor")
        tensors[name] = tensor.detach().contiguous().clone()
    return tensors


def words_of(error: BaseException) -> str:
    """What is wrong, without torch's advice on how to load the file all the same."""
    words = " ".join(str(error).split())
    for advice in ADVICE:
        words = words.partition(advice)[0]
    parts = LEAD.split(words)
    return next((part for part in reversed(parts) if part.strip()), words).strip()


def main(source: Path, target: Path) -> None:
    """Convert, or end with one line on stderr and status 1."""
    set_limits(source.stat().st_size)
    try:
        from safetensors.torch import save_file

        save_file(weights_in(read(source)), target, metadata={"format": "pt"})  # type: ignore[arg-type]
    except BaseException as error:
        target.unlink(missing_ok=True)
        sys.stderr.write(f"{type(error).__name__}: {words_of(error)[:300]}\n")
        sys.exit(1)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))

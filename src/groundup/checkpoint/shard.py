"""Files of tensors in the safetensors format: written piece by piece, and read only after a look at their header."""

import json
from collections.abc import Container, Iterator, Mapping
from math import prod
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from groundup.base.disk import CHUNK_BYTES

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER_BYTES = 100_000_000
MAX_DIMS = 64


def shard_head(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> tuple[bytes, dict[str, int]]:
    """The header of a safetensors file with its length, and where in the file each tensor begins, in the order in which they
    lie. Of the tensors, which may be on the meta device, shape and dtype count. Raises KeyError for a dtype."""
    # wide dtypes first, so that each tensor begins at a multiple of its item size
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    begins: dict[str, int] = {}
    end = 0
    for name in names:
        tensor = tensors[name]
        begins[name], end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begins[name], end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return head, {name: len(head) + begin for name, begin in begins.items()}


def shard_pieces(tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    """The bytes of a safetensors file, without a copy of what is contiguous on the CPU. Raises KeyError for a dtype."""
    head, begins = shard_head(tensors)
    yield memoryview(head)
    for name in begins:
        yield from tensor_pieces(tensors[name])


def tensor_pieces(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor, without a copy of what is contiguous on the CPU."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    if flat.numel():
        data = flat.view(torch.uint8).numpy().data
        for place in range(0, len(data), CHUNK_BYTES):
            yield data[place : place + CHUNK_BYTES]


def header_bytes(head: bytes, file_bytes: int) -> int:
    """Length of the header with the 8 bytes before it, given the first 8. Raises ValueError if there is no room."""
    length = int.from_bytes(head[:8], "little")
    if len(head) < 8 or not 2 <= length <= min(MAX_HEADER_BYTES, file_bytes - 8):
        raise ValueError(f"a header of {length} bytes in a file of {file_bytes}")
    return 8 + length


def check_header(head: bytes, file_bytes: int) -> None:
    """Raise ValueError unless `head`, the header with its length, describes tensors that tile the file."""
    try:
        header = json.loads(head[8:])
    except RecursionError:
        raise ValueError("the header is nested too deep") from None
    if not isinstance(header, dict):
        raise ValueError("the header is not an object")
    header.pop("__metadata__", None)
    spans = []
    for name, entry in header.items():
        if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"tensor {name[:80]!r} is not described")
        shape, span = entry["shape"], entry["data_offsets"]
        if (
            not (_are_sizes(shape) and _are_sizes(span) and len(span) == 2 and len(shape) <= MAX_DIMS)
            or str(entry["dtype"]) not in DTYPES
        ):
            raise ValueError(f"tensor {name[:80]!r} has an impossible dtype, shape or place")
        num_bytes = DTYPES[entry["dtype"]].itemsize
        for size in shape:
            num_bytes *= size
        if span[1] - span[0] != num_bytes:
            raise ValueError(f"tensor {name[:80]!r} does not fill its place")
        spans.append(span)
    end = 0
    for span in sorted(spans):
        if span[0] != end:
            raise ValueError("tensors overlap or leave gaps")
        end = span[1]
    if len(head) + end != file_bytes:
        raise ValueError("the tensors are not as long as the file")


def _are_sizes(values: object) -> bool:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 1 << 62 for value in values)


def described(head: bytes) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of every tensor, by name, of a header that `check_header` let pass; in the order in which they lie."""
    header = json.loads(head[8:])
    header.pop("__metadata__", None)
    in_order = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    return {name: (tuple(entry["shape"]), DTYPES[entry["dtype"]]) for name, entry in in_order}


def read_head(chunks: Iterator[bytes], file_bytes: int) -> tuple[bytes, bytes]:
    """The header of a safetensors file with its length, checked, and what came behind it in the same chunk. Raises ValueError."""
    data = b""
    while len(data) < 8 or len(data) < header_bytes(data, file_bytes):
        chunk = next(chunks, b"")
        if not chunk:
            raise ValueError("the header ends early")
        data += chunk
    end = header_bytes(data, file_bytes)
    check_header(data[:end], file_bytes)
    return data[:end], data[end:]


def stream_shard(chunks: Iterator[bytes], file_bytes: int, wanted: Container[str]) -> Iterator[tuple[str, Tensor]]:
    """The wanted tensors of a safetensors file, one after the other, each in memory of its own; all chunks are read.

    Raises ValueError for anything else than such a file.
    """
    head, rest = read_head(chunks, file_bytes)
    chunk = memoryview(rest)
    for name, (shape, dtype) in described(head).items():
        num_bytes, done = dtype.itemsize * prod(shape), 0
        raw = torch.empty(num_bytes, dtype=torch.uint8) if name in wanted else None
        while done < num_bytes:
            if not chunk:
                chunk = memoryview(next(chunks, b""))
                if not chunk:
                    raise ValueError(f"tensor {name[:80]!r} ends early")
            size = min(len(chunk), num_bytes - done)
            if raw is not None:
                raw.numpy()[done : done + size] = chunk[:size]
            chunk, done = chunk[size:], done + size
        if raw is not None:
            yield name, raw.view(dtype).reshape(shape)
        del raw  # before the next one is made
    for _ in chunks:
        pass


def parse_shard(data: bytes) -> dict[str, Tensor]:
    """Tensors of a safetensors file's bytes. Raises ValueError for anything else."""
    check_header(data[: header_bytes(data, len(data))], len(data))
    try:
        return load(data)
    except SafetensorError as error:
        raise ValueError(str(error)) from None


def is_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither infinities nor NaN."""
    if not tensor.is_floating_point():
        return True
    if tensor.element_size() == 1:
        tensor = tensor.float()
    # a sum carries every infinity and NaN; only one that overflowed needs the slower look
    total = tensor.sum(dtype=torch.float64 if tensor.dtype == torch.float64 else torch.float32)
    return bool(total.isfinite()) or bool(tensor.isfinite().all())

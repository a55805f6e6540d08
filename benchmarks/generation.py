"""Generation with a cache beside transformers' `generate`: tokens a second, greedy, one prompt and eight."""

import argparse
import hashlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks.turns import Figures, measure_in_turn, median_of, prepare, ratios, run_worker

prepare()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks import material  # noqa: E402
from benchmarks.results import add_row  # noqa: E402
from groundup.generate.config import SamplingConfig  # noqa: E402
from groundup.generate.generator import complete  # noqa: E402
from groundup.model.causal_lm import CausalLM  # noqa: E402

PROMPT_TOKENS = 32
PROMPTS = (1, 8)
REPEATS = 5


def main() -> int:
    """Each side in processes of its own, in turn, on the same weights; greedy outputs must be equal."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generation", description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", default="30M", choices=tuple(material.SHAPES))
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--worker", choices=("ours", "theirs"))
    wanted = parser.parse_args()
    if run_worker({"ours": ours, "theirs": theirs}, wanted):
        return 0
    common = ["benchmarks.generation", "--shape", wanted.shape, "--tokens", str(wanted.tokens)]
    found = measure_in_turn({side: [*common, "--worker", side] for side in ("ours", "theirs")}, wanted.rounds)
    assert len({figures["said"] for side in found.values() for figures in side}) == 1, "greedy outputs differ"
    cells = {"shape": f"{wanted.shape}, fp32, {wanted.tokens} tokens"}
    for count in PROMPTS:
        rates = " / ".join(f"{median_of(found[side], f'rate {count}'):,.0f}" for side in ("ours", "theirs"))
        share = statistics.median(ratios(found["ours"], found["theirs"], f"rate {count}"))
        plural = "s" if count > 1 else ""
        cells[f"{count} prompt{plural}: tokens/s, ours / transformers"] = f"{rates} = **{share:.2f}**"
    add_row("Generation", "python -m benchmarks.generation", cells)
    print("\n".join(f"{name}: {value}" for name, value in cells.items()))
    return 0


def ours(wanted: argparse.Namespace) -> Figures:
    """Ours, its weights laid out for reading."""
    model = made(wanted.shape)
    model.fuse_for_reading()
    config = SamplingConfig(temperature=0.0, max_new_tokens=wanted.tokens)
    return measured(lambda prompts: [one.ids for one in complete(model, prompts.tolist(), config, [])], wanted)


def theirs(wanted: argparse.Namespace) -> Figures:
    """transformers."""
    import transformers

    shape = material.shape_of(wanted.shape, 6400)
    config = transformers.Qwen3Config(
        **material.same_fields(shape), eos_token_id=None, bos_token_id=None, pad_token_id=0
    )
    model: Any = transformers.Qwen3ForCausalLM(config)
    model.load_state_dict(made(wanted.shape).state_dict())
    model.eval()

    def generate(prompts: Tensor) -> list[list[int]]:
        mask = torch.ones_like(prompts)
        found = model.generate(prompts, attention_mask=mask, max_new_tokens=wanted.tokens, do_sample=False)
        new: list[list[int]] = found[:, PROMPT_TOKENS:].tolist()
        return new

    return measured(generate, wanted)


def made(shape_name: str) -> CausalLM:
    """The same random weights on both sides."""
    model = CausalLM(material.shape_of(shape_name, 6400))
    model.initialize(torch.Generator().manual_seed(0))
    return model.eval()


def measured(generate: Callable[[Tensor], list[list[int]]], wanted: argparse.Namespace) -> Figures:
    """Tokens a second for each number of prompts, the first call left out, and a hash of what was generated."""
    material.use_all_cores()
    figures: Figures = {}
    said = hashlib.sha256()
    for count in PROMPTS:
        prompts = torch.randint(1, 6400, (count, PROMPT_TOKENS), generator=torch.Generator().manual_seed(1))
        said.update(repr(generate(prompts)).encode())
        seconds = []
        for _ in range(REPEATS):
            began = time.perf_counter()
            generate(prompts)
            seconds.append(time.perf_counter() - began)
        figures[f"rate {count}"] = count * wanted.tokens / statistics.median(seconds)
    return figures | {"said": said.hexdigest()}


if __name__ == "__main__":
    sys.exit(main())

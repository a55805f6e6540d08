"""Generation with a cache beside transformers' `generate`: tokens a second, greedy, one prompt and eight."""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from groundup.base.machine import prepare_process

prepare_process()

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks import material  # noqa: E402
from benchmarks.results import add_row  # noqa: E402
from groundup.generate.config import SamplingConfig  # noqa: E402
from groundup.generate.generator import complete  # noqa: E402
from groundup.model.causal_lm import CausalLM  # noqa: E402

PROMPT_TOKENS = 32


def main() -> int:
    """Both in one process, in turn, on the same weights; greedy outputs must be equal."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.generation", description=__doc__.partition("\n")[0])
    parser.add_argument("--shape", default="30M", choices=tuple(material.SHAPES))
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    wanted = parser.parse_args()
    material.use_all_cores()
    ours, theirs = both_models(wanted.shape)
    cells = {"shape": f"{wanted.shape}, fp32, {wanted.tokens} tokens"}
    for num_prompts in (1, 8):
        prompts = torch.randint(1, 6400, (num_prompts, PROMPT_TOKENS), generator=torch.Generator().manual_seed(1))
        config = SamplingConfig(temperature=0.0, max_new_tokens=wanted.tokens)
        sides = {
            "ours": partial(generate_ours, ours, prompts, config),
            "theirs": partial(generate_theirs, theirs, prompts, wanted.tokens),
        }
        assert sides["ours"]() == sides["theirs"](), "greedy outputs differ"
        seconds = in_turn(sides, wanted.rounds)
        rate = {name: num_prompts * wanted.tokens / statistics.median(found) for name, found in seconds.items()}
        share = statistics.median(b / a for a, b in zip(seconds["ours"], seconds["theirs"], strict=True))
        cells[f"{num_prompts} prompt{'s' if num_prompts > 1 else ''}: tokens/s, ours / transformers"] = (
            f"{rate['ours']:,.0f} / {rate['theirs']:,.0f} = **{share:.2f}**"
        )
    add_row("Generation", "python -m benchmarks.generation", cells)
    print("\n".join(f"{name}: {value}" for name, value in cells.items()))
    return 0


def generate_ours(model: CausalLM, prompts: Tensor, config: SamplingConfig) -> list[list[int]]:
    """New tokens of each prompt, ours."""
    return [completion.ids for completion in complete(model, prompts.tolist(), config, [])]


def generate_theirs(model: Any, prompts: Tensor, num_tokens: int) -> list[list[int]]:
    """New tokens of each prompt, theirs."""
    mask = torch.ones_like(prompts)
    found = model.generate(prompts, attention_mask=mask, max_new_tokens=num_tokens, do_sample=False)
    new: list[list[int]] = found[:, PROMPT_TOKENS:].tolist()
    return new


def in_turn(functions: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each function, called in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            began = time.perf_counter()
            function()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def both_models(shape_name: str) -> tuple[CausalLM, Any]:
    """The same random weights in ours and in transformers' model."""
    import transformers

    shape = material.shape_of(shape_name, 6400)
    ours = CausalLM(shape)
    ours.initialize(torch.Generator().manual_seed(0))
    theirs = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(**material.same_fields(shape), eos_token_id=None, bos_token_id=None, pad_token_id=0)
    )
    theirs.load_state_dict(ours.state_dict())
    ours.fuse_for_reading()
    return ours.eval(), theirs.eval()


if __name__ == "__main__":
    sys.exit(main())

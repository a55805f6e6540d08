"""What `accelerate launch` asks for by its variables, beside what the recipe says: the recipe alone is obeyed."""

from collections.abc import Iterator, Mapping

from groundup.base.errors import ConfigError

_ENGINES = {
    "ACCELERATE_USE_FSDP": "set parallel.data_shard in the recipe",
    "ACCELERATE_USE_DEEPSPEED": "set parallel.engine: deepspeed and parallel.data_shard in the recipe",
    "ACCELERATE_USE_MEGATRON_LM": "set parallel.tensor in the recipe",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "set the degrees of parallel: in the recipe",
}
_OFF = ("", "0", "false", "no")


def refuse_contradiction(
    environment: Mapping[str, str], section: str, *, precision: str, device: str, compiles: bool | str
) -> None:
    """Raise ConfigError for the first ACCELERATE_* variable that asks for something else than a section of the recipe.

    What accelerate sets where nobody asked (mixed precision `no`, one step of accumulation) asks for nothing.
    """
    for name, then in _contradictions(environment, section, precision, device, compiles):
        raise ConfigError(
            "E-CONFIG-ACCELERATE",
            what=f"{name}={environment[name]} is not what the recipe says",
            where=section,
            next=f"{then}, and leave it out of accelerate's settings",
        )


def _contradictions(
    environment: Mapping[str, str], section: str, precision: str, device: str, compiles: bool | str
) -> Iterator[tuple[str, str]]:
    values = {name: value.lower() for name, value in environment.items() if name.startswith("ACCELERATE_")}
    for name, then in _ENGINES.items():
        if values.get(name, "") not in _OFF:
            yield name, then
    if values.get("ACCELERATE_MIXED_PRECISION", "no") not in (*_OFF, precision):
        yield "ACCELERATE_MIXED_PRECISION", f"set {section}.precision in the recipe"
    if values.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1") not in ("", "1"):
        yield (
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS",
            f"set {section}.batch_size_tokens and {section}.micro_batch_rows, which it follows from",
        )
    if values.get("ACCELERATE_DYNAMO_BACKEND", "no") not in _OFF and compiles is not True:
        yield "ACCELERATE_DYNAMO_BACKEND", f"set {section}.compile in the recipe"
    if values.get("ACCELERATE_USE_CPU", "") not in _OFF and device != "cpu":
        yield "ACCELERATE_USE_CPU", f"set {section}.device: cpu in the recipe"

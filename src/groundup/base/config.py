"""Recipes: YAML with line numbers, overrides by dotted name, and errors that name file, line and nearest key."""

import difflib
from collections.abc import Iterator, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, TypeVar, get_args

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from groundup.base.errors import ConfigError

MAX_RECIPE_BYTES = 1 << 20
MAX_DEPTH = 32
PLAIN_TAGS = {"tag:yaml.org,2002:map", "tag:yaml.org,2002:seq"}
BINARY_TAG = "tag:yaml.org,2002:binary"

COSMETIC: dict[str, Any] = {"cosmetic": True}
"""`json_schema_extra` of a field that cannot change a single bit of a stage's output (workers, log intervals)."""


class Config(BaseModel):
    """A frozen section of a recipe; an unknown key is an error; the docstring under a field is its help."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)


AnyConfig = TypeVar("AnyConfig", bound=Config)


def is_cosmetic(field: FieldInfo) -> bool:
    """Whether a field is marked as unable to change the output."""
    extra = field.json_schema_extra
    return isinstance(extra, dict) and bool(extra.get("cosmetic"))


def numerics(config: Config) -> dict[str, Any]:
    """The JSON values of all fields that can change the output, nested as in the recipe."""
    values: dict[str, Any] = {}
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if is_cosmetic(field):
            continue
        if isinstance(value, Config):
            values[name] = numerics(value)
        elif isinstance(value, Mapping) and value and all(isinstance(entry, Config) for entry in value.values()):
            values[name] = {key: numerics(entry) for key, entry in value.items()}
        else:
            values[name] = config.model_dump(mode="json")[name]
    return values


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one mapping with dotted names."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{name}."))
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def read_yaml(path: Path) -> tuple[dict[str, Any], dict[str, int]]:
    """Values of a YAML file, and the line of each dotted name. Raises ConfigError for anything but a plain mapping."""
    try:
        if path.stat().st_size > MAX_RECIPE_BYTES:
            raise ConfigError(
                "E-CONFIG-SIZE",
                what=f"a recipe of {path.stat().st_size} bytes",
                where=path,
                next=f"keep it under {MAX_RECIPE_BYTES} bytes",
            )
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(
            "E-CONFIG-FILE",
            what=f"cannot read the recipe: {error.strerror}",
            where=path,
            next="give the path of a YAML file, or the name of a recipe that ships with groundup",
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            "E-CONFIG-FILE", what=f"the recipe is not UTF-8 (byte {error.start})", where=path, next="save it as UTF-8"
        ) from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, where: str) -> tuple[dict[str, Any], dict[str, int]]:
    """As `read_yaml`, from a text."""
    lines: dict[str, int] = {}
    loader: yaml.SafeLoader | None = None
    try:
        loader = yaml.SafeLoader(text)  # looks for characters that no YAML may hold
        _refuse_aliases_and_depth(text, where)
        root = loader.get_single_node()
        values = {} if root is None else _construct(loader, root, "", lines, where)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f"{where}:{mark.line + 1}" if mark else where
        raise ConfigError(
            "E-CONFIG-YAML",
            what=f"not valid YAML: {getattr(error, 'problem', None) or 'unreadable'}",
            where=line,
            next="mend that line",
        ) from None
    except (RecursionError, ValueError) as error:
        raise ConfigError(
            "E-CONFIG-YAML",
            what=f"not valid YAML: {type(error).__name__}",
            where=where,
            next="write plain values, few levels deep",
        ) from None
    finally:
        if loader is not None:
            loader.dispose()
    if not isinstance(values, dict):
        raise ConfigError(
            "E-CONFIG-YAML",
            what=f"a recipe is a mapping, got {type(values).__name__}",
            where=where,
            next="write `section:` lines",
        )
    return values, lines


def _refuse_aliases_and_depth(text: str, where: str) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):  # lazily: the scanner's time grows with the square of depth
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        line = f"{where}:{event.start_mark.line + 1}" if event.start_mark else where
        if isinstance(event, yaml.AliasEvent):
            raise ConfigError(
                "E-CONFIG-YAML",
                what="anchors and aliases are not allowed in a recipe",
                where=line,
                next="write the value out",
            )
        if depth > MAX_DEPTH:
            raise ConfigError(
                "E-CONFIG-YAML", what=f"more than {MAX_DEPTH} levels", where=line, next="write plain values"
            )


def _construct(loader: yaml.SafeLoader, node: yaml.Node, name: str, lines: dict[str, int], where: str) -> Any:
    lines[name] = node.start_mark.line + 1
    if node.tag == BINARY_TAG or (not isinstance(node, yaml.ScalarNode) and node.tag not in PLAIN_TAGS):
        raise ConfigError(
            "E-CONFIG-YAML",
            what=f"the tag {node.tag!r} is not allowed in a recipe",
            where=f"{where}:{lines[name]}",
            next="write the value without it",
        )
    if isinstance(node, yaml.MappingNode):
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = str(loader.construct_object(key_node, deep=True))
            line = key_node.start_mark.line + 1
            if key in values:
                raise ConfigError(
                    "E-CONFIG-DUPLICATE",
                    what=f"the key {key!r} stands twice",
                    where=f"{where}:{line}",
                    next="keep one of them",
                )
            dotted = f"{name}.{key}" if name else key
            values[key] = _construct(loader, value_node, dotted, lines, where)
            lines[dotted] = line
        return values
    if isinstance(node, yaml.SequenceNode):
        return [_construct(loader, item, f"{name}.{index}", lines, where) for index, item in enumerate(node.value)]
    return loader.construct_object(node, deep=True)


def apply_overrides(values: dict[str, Any], overrides: Sequence[tuple[str, str]]) -> set[str]:
    """Put `--a.b value` pairs into nested values; returns the dotted names that were set."""
    for dotted, text in overrides:
        *parents, leaf = dotted.split(".")
        section = values
        for parent in parents:
            section = section.setdefault(parent, {})
            if not isinstance(section, dict):
                raise ConfigError(
                    "E-CONFIG-KEY",
                    what=f"{parent!r} is a value, not a section",
                    where=f"command line --{dotted}",
                    next="see the recipe's sections",
                )
        try:
            section[leaf] = yaml.safe_load(text) if text else text
        except (yaml.YAMLError, ValueError, RecursionError):  # ValueError: a date that is none
            section[leaf] = text
    return {dotted for dotted, _ in overrides}


def validate(
    model: type[AnyConfig],
    values: Mapping[str, Any],
    *,
    where: str,
    lines: Mapping[str, int],
    overridden: Set[str] = frozenset(),
) -> AnyConfig:
    """Values as a config object. Raises ConfigError for the first fault, with its place and the nearest known key."""
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise _as_config_error(model, error, where, lines, overridden) from None


def _as_config_error(
    model: type[Config], error: ValidationError, where: str, lines: Mapping[str, int], overridden: Set[str]
) -> ConfigError:
    # a misspelt key is also a missing one: the first says what to do
    faults = sorted(error.errors(include_url=False), key=lambda fault: fault["type"] != "extra_forbidden")
    fault = faults[0]
    location = [str(part) for part in fault["loc"]]
    # a union adds the names of its members to the location: only parts that are keys of the file are kept
    dotted = ".".join(location)
    known = dotted
    while known and known not in lines and known not in overridden:
        known = known.rpartition(".")[0]
    place = f"command line --{known}" if known in overridden else f"{where}:{lines[known]}" if known in lines else where
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    if fault["type"] == "extra_forbidden":
        names = sorted(_fields_at(model, location[:-1]))
        nearest = difflib.get_close_matches(location[-1], names, n=1, cutoff=0.4)
        advice = f"did you mean {nearest[0]!r}?" if nearest else f"known here: {', '.join(names)}"
        return ConfigError("E-CONFIG-KEY", what=f"unknown key {dotted!r}{more}", where=place, next=advice)
    if fault["type"] == "missing":
        return ConfigError("E-CONFIG-MISSING", what=f"{dotted!r} is needed{more}", where=place, next="add it")
    message = fault["msg"].removeprefix("Value error, ")
    got = "" if isinstance(fault["input"], Mapping) else f", got {str(fault['input'])[:60]!r}"
    return ConfigError(
        "E-CONFIG-VALUE",
        what=f"{known or dotted or 'recipe'}: {message}{got}{more}",
        where=place,
        next="change the value",
    )


def _fields_at(model: type[Config], location: Sequence[str]) -> set[str]:
    for part in location:
        if part in model.model_fields:
            nested = next(_config_types(model.model_fields[part].annotation), None)
            model = nested or model
    return set(model.model_fields)


def _config_types(annotation: Any) -> Iterator[type[Config]]:
    if isinstance(annotation, type) and issubclass(annotation, Config):
        yield annotation
    for inner in get_args(annotation):
        yield from _config_types(inner)

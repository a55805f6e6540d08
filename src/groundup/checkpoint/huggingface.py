"""Model directories in Hugging Face's form: written and read so that other tools load ours and we load theirs."""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from groundup.base.errors import CheckpointError, ConfigError
from groundup.base.files import write_json
from groundup.base.pickles import refuse_pickle
from groundup.checkpoint.experts import stacked, unstacked
from groundup.checkpoint.shard import is_finite, shard_head, tensor_pieces
from groundup.checkpoint.weight_files import weight_files
from groundup.model.causal_lm import CausalLM
from groundup.model.config import (
    EXPERT_FIELDS,
    SPARSE_TYPES,
    WINDOWLESS,
    WINDOWS_BY_LAYER,
    ModelConfig,
    fields_about_experts,
)
from groundup.model.rope_config import NEEDED, READ, RopeParameters
from groundup.tokenizer.bpe import TextTokenizer

ARCHITECTURES = {
    "qwen3": "Qwen3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "dots1": "Dots1ForCausalLM",
}
EXPERT_COUNTS = {
    "qwen3_moe": ("num_experts", "num_local_experts"),
    "mixtral": ("num_local_experts",),
    "dots1": ("n_routed_experts",),
}
"""What config.json calls the number of experts."""
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
ROUTER_BIAS = "e_score_correction_bias"
KINDS = ("full_attention", "sliding_attention")
WINDOW_FIELDS = ("sliding_window", "max_window_layers", "layer_types")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json")


def model_dtype(name: str) -> torch.dtype:
    """The torch dtype of a config's word. Raises ConfigError for one that weights are not stored in."""
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    if name not in dtypes:
        raise ConfigError("E-DTYPE", what=f"unknown dtype {name!r}", next=f"use one of {', '.join(dtypes)}")
    return dtypes[name]


def config_json(
    config: ModelConfig, *, dtype: torch.dtype, eos_token_ids: list[int], pad_token_id: int
) -> dict[str, Any]:
    """config.json of a model: no path, no time."""
    return {
        "architectures": [ARCHITECTURES[config.model_type]],
        "model_type": config.model_type,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_size,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": config.rope_parameters.model_dump(exclude_none=True) | {"rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_word_embeddings,
        "attention_bias": config.attention_bias,
        "mlp_bias": False,
        "hidden_act": "silu",
        "initializer_range": config.initializer_range,
        **_windows(config),
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "eos_token_id": eos_token_ids[0],
        "pad_token_id": pad_token_id,
        "dtype": str(dtype).removeprefix("torch."),
        "use_cache": True,
        **_expert_fields(config),
    }


def _expert_fields(config: ModelConfig) -> dict[str, Any]:
    """The part of config.json about experts; fields that only training reads stand beside those of `transformers`."""
    if config.model_type not in SPARSE_TYPES:
        return {}
    fields = {name: getattr(config, name) for name in fields_about_experts(config.model_type)}
    # Hub checkpoints say num_experts, transformers from version 5 on num_local_experts, dots1 n_routed_experts
    for name in EXPERT_COUNTS[config.model_type]:
        fields[name] = config.num_experts
    if config.model_type == "dots1":
        fields |= {"n_group": 1, "topk_group": 1, "max_window_layers": config.num_hidden_layers}
    return fields


def _windows(config: ModelConfig) -> dict[str, Any]:
    """The words of config.json for the sliding window; absent ones would become the defaults of `transformers`."""
    if config.model_type not in WINDOWS_BY_LAYER:
        window: dict[str, Any] = {} if config.model_type == "llama" else {"sliding_window": config.sliding_window}
        return {"use_sliding_window": config.sliding_window is not None} | window
    if config.sliding_window is None:
        return {"use_sliding_window": False}
    windows = [config.window_of(layer) for layer in range(config.num_hidden_layers)]
    return {
        "use_sliding_window": True,
        "sliding_window": config.sliding_window,
        "max_window_layers": config.max_window_layers,
        "layer_types": ["full_attention" if window is None else "sliding_attention" for window in windows],
    }


def _window_fields(model_type: str, values: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """The fields of a ModelConfig for what config.json says of a window; what it leaves out has the default of
    `transformers`. Raises ConfigError for kinds of layers that are not computed here."""
    is_by_layer = model_type in WINDOWS_BY_LAYER
    window = values.get("sliding_window", None if model_type == "mixtral" else 4096)
    is_used = values.get("use_sliding_window", model_type in ("mistral", "mixtral"))
    if model_type in WINDOWLESS or window is None or not is_used:
        return {}
    if not is_by_layer:
        return {"sliding_window": window}
    layers, first = values["num_hidden_layers"], values.get("max_window_layers", 28)
    types = values.get("layer_types") or [KINDS[layer >= first] for layer in range(layers)]
    if not set(types) <= set(KINDS):
        raise _refused(f"layer_types {sorted(set(types) - set(KINDS))}", where)
    if KINDS[True] not in types:
        return {}
    first = types.index(KINDS[True])
    if types == [KINDS[layer >= first] for layer in range(layers)]:
        return {"sliding_window": window, "max_window_layers": first}
    return {"sliding_window": window, "layer_types": tuple(types)}


def save_model(
    folder: Path,
    config: ModelConfig,
    weights: Iterable[tuple[str, Tensor]],
    tokenizer: TextTokenizer,
    *,
    eos_token_ids: list[int],
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write config, weights and tokenizer into `folder`. `weights` are the full-precision tensors by name, all of them, in any
    order; each is let go of before the next one is taken."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_weights(folder / "model.safetensors", config, weights, dtype)
    pad = tokenizer.end_of_text_id
    write_json(folder / "config.json", config_json(config, dtype=dtype, eos_token_ids=eos_token_ids, pad_token_id=pad))
    write_json(folder / "generation_config.json", {"eos_token_id": eos_token_ids, "pad_token_id": pad})
    copy_tokenizer(tokenizer.folder, folder, eos_token_id=eos_token_ids[0], tokenizer=tokenizer)


def _write_weights(path: Path, config: ModelConfig, weights: Iterable[tuple[str, Tensor]], dtype: torch.dtype) -> None:
    """A safetensors file whose tensors are put to their places as they come."""

    def on_disk(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
        for place, part in unstacked(config, {name: tensor}).items():
            # a router's bias chooses experts by differences that a short dtype does not hold
            yield place, part.detach() if place.endswith(ROUTER_BIAS) else part.detach().to(dtype)

    named = CausalLM.without_memory(config).named_parameters()
    described = {place: part for name, tensor in named for place, part in on_disk(name, tensor)}
    head, begins = shard_head(described, {"format": "pt"})
    with path.open("wb") as file:
        file.write(head)
        for name, tensor in weights:
            if config.tie_word_embeddings and name == HEAD:
                continue
            for place, part in on_disk(name, tensor):
                assert described.pop(place).shape == part.shape, place
                file.seek(begins[place])
                file.writelines(tensor_pieces(part))
                del part
            del tensor  # before the next one is made
    assert not described, f"no values for {sorted(described)}"


def copy_tokenizer(source: Path, folder: Path, *, eos_token_id: int, tokenizer: TextTokenizer) -> None:
    """Copy a tokenizer directory; its config names the token that ends what the model writes."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file() and name != "tokenizer_config.json":
            shutil.copyfile(source / name, folder / name)
    config = dict(tokenizer.config)
    config["eos_token"] = tokenizer.tokenizer.id_to_token(eos_token_id)
    write_json(folder / "tokenizer_config.json", config)


def read_model_config(folder: Path) -> ModelConfig:
    """ModelConfig of a directory's config.json. Raises ConfigError for what groundup cannot compute exactly."""
    path = folder / "config.json"
    if not path.is_file():
        raise ConfigError(
            "E-MODEL-NONE",
            what="no config.json: not a model directory",
            where=folder,
            next="give a Hugging Face model directory or a run",
        )
    try:
        values = json.loads(path.read_bytes())
    except ValueError as error:
        refuse_pickle(path)
        raise ConfigError(
            "E-MODEL-CONFIG", what=f"config.json is not JSON: {error}", where=path, next="repair or download it again"
        ) from None
    model_type = values.get("model_type")
    if model_type not in ARCHITECTURES:
        raise ConfigError(
            "E-MODEL-TYPE",
            what=f"{model_type=} is not one groundup computes",
            where=path,
            next=f"known: {', '.join(ARCHITECTURES)}",
        )
    rope = values.get("rope_parameters") or {}
    scaling = values.get("rope_scaling") or {}
    refused = {
        "attention_bias": bool(values.get("attention_bias")) and model_type == "qwen2",
        "rotary positions on a part of each head": rope.get("partial_rotary_factor", 1.0) != 1.0,
        "mlp_bias": bool(values.get("mlp_bias")),
        "sliding attention": model_type == "dots1" and KINDS[True] in (values.get("layer_types") or ()),
        "groups of experts": values.get("n_group") not in (None, 1),
        f"hidden_act {values.get('hidden_act')}": values.get("hidden_act", "silu") != "silu",
    }
    for what, is_asked in refused.items():
        if is_asked:
            raise _refused(what, path)
    by_name = ModelConfig.model_fields.keys() - {"model_type", *WINDOW_FIELDS}
    fields = {name: values[name] for name in by_name if values.get(name) is not None}
    fields |= _window_fields(model_type, values, path)
    fields["rope_theta"] = rope.get("rope_theta", values.get("rope_theta", 10_000.0))
    fields["rope_parameters"] = _rope_parameters(rope or scaling, path)
    fields.setdefault("num_key_value_heads", values.get("num_attention_heads"))
    fields.setdefault("tie_word_embeddings", False)
    fields = _read_expert_fields(model_type, values, fields)
    try:
        return ModelConfig(model_type=model_type, **fields)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ConfigError(
            "E-MODEL-CONFIG", what=f"{place}: {first['msg']}", where=path, next="repair or download it again"
        ) from None


def _rope_parameters(values: Mapping[str, Any], path: Path) -> RopeParameters:
    """The scaling of rotary positions, by either of its two names. Raises ConfigError for one not computed here."""
    rope_type = values.get("rope_type") or values.get("type") or "default"
    if rope_type not in NEEDED:
        raise ConfigError(
            "E-MODEL-FEATURE",
            what=f"the model uses rope scaling {rope_type!r}, which is not computed here",
            where=path,
            next=f"known: {', '.join(NEEDED)}",
        )
    # other tools write fields that a type does not read
    read = {name: values[name] for name in READ[rope_type] if values.get(name) is not None}
    try:
        return RopeParameters(rope_type=rope_type, **read)
    except ValidationError as error:
        raise ConfigError(
            "E-MODEL-CONFIG",
            what=f"rope scaling: {error.errors()[0]['msg']}",
            where=path,
            next="repair or download it again",
        ) from None


def _read_expert_fields(model_type: str, values: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    """The fields about experts under our names; what is not there has the default of `transformers`."""
    known = fields_about_experts(model_type)
    fields = {name: value for name, value in fields.items() if name in known or name not in EXPERT_FIELDS}
    if model_type in SPARSE_TYPES:
        counts = [values[name] for name in EXPERT_COUNTS[model_type] if values.get(name) is not None]
        fields["num_experts"] = counts[0] if counts else None
    if "norm_topk_prob" in known:
        fields.setdefault("norm_topk_prob", False)
    return fields


def _refused(what: str, where: Path) -> ConfigError:
    return ConfigError(
        "E-MODEL-FEATURE",
        what=f"the model uses {what}, which is not computed here",
        where=where,
        next="choose a model without it",
    )


def read_weights(folder: Path) -> dict[str, Tensor]:
    """All tensors of a directory's safetensors files. Raises CheckpointError for pickles and damaged files."""
    tensors: dict[str, Tensor] = {}
    for path in weight_files(folder):
        with damage_named(path):
            tensors.update(load_file(path))
    return tensors


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """What goes wrong with reading a safetensors file, as a CheckpointError that says whether it is a pickle."""
    try:
        yield
    except (SafetensorError, OSError, ValueError) as error:
        refuse_pickle(path)
        raise CheckpointError(
            "E-MODEL-DAMAGED", what=f"cannot be read: {str(error)[:120]}", where=path, next="copy or make it again"
        ) from None


def load_weights(model: CausalLM, tensors: Mapping[str, Tensor], where: object) -> None:
    """Put tensors into a model; a missing, unexpected or wrongly shaped one is a CheckpointError that lists them."""
    expected = dict(model.named_parameters())
    if model.config.tie_word_embeddings and {HEAD, EMBEDDING} <= tensors.keys():
        refuse_untied(tensors[HEAD], tensors[EMBEDDING], where)
    tensors = belonging(model.config, expected, tensors, where)
    with torch.no_grad():
        for name, parameter in expected.items():
            refuse_not_finite(name, tensors[name], where)
            parameter.copy_(tensors[name])


def belonging(
    config: ModelConfig, expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor], where: object
) -> dict[str, Tensor]:
    """Tensors of a directory under the names in memory. Raises CheckpointError, with a list, for one that is missing,
    unexpected or of another shape than in `expected`; no value is looked at."""
    # older files hold the rotary frequencies too, which are computed
    tensors = {name: tensor for name, tensor in tensors.items() if not name.endswith(".rotary_emb.inv_freq")}
    tensors = stacked(config, tensors)
    if config.tie_word_embeddings:
        tensors.pop(HEAD, None)
    missing, unexpected = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or unexpected:
        raise CheckpointError(
            "E-KEYS",
            what=f"missing {len(missing)}: {missing[:20]}, unexpected {len(unexpected)}: {unexpected[:20]}",
            where=where,
            next="the weights do not belong to this config.json",
        )
    for name, parameter in expected.items():
        if tensors[name].shape != parameter.shape:
            raise CheckpointError(
                "E-SHAPE",
                what=f"{name} is {list(tensors[name].shape)}, the config says {list(parameter.shape)}",
                where=where,
                next="the weights do not belong to this config.json",
            )
    return tensors


def refuse_untied(head: Tensor, embedding: Tensor, where: object) -> None:
    """Raise CheckpointError for a stored head that is not the embedding, though config.json ties them.

    Other tools take it for a model of its own, or drop it: both give numbers that nobody trained.
    """
    if head.shape != embedding.shape or not torch.equal(head.float(), embedding.float()):
        raise CheckpointError(
            "E-KEYS",
            what=f"{HEAD} is stored and differs from the embedding, to which config.json ties it",
            where=where,
            next="set tie_word_embeddings to false in config.json, or remove lm_head.weight if the embedding is right",
        )


def refuse_not_finite(name: str, tensor: Tensor, where: object) -> None:
    """Raise CheckpointError for a weight with infinities or NaN."""
    if not is_finite(tensor):
        raise CheckpointError(
            "E-NONFINITE",
            what=f"{name} holds values that are not finite",
            where=where,
            next="go back to an earlier checkpoint",
        )


def load_model(folder: Path, *, dtype: torch.dtype = torch.float32) -> CausalLM:
    """The model of a directory, in `dtype`."""
    model = CausalLM(read_model_config(folder))
    load_weights(model, read_weights(folder), folder)
    return model.to(dtype)


def _read_object(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_bytes()))
    except (ValueError, TypeError) as error:
        refuse_pickle(path)
        raise ConfigError(
            "E-MODEL-CONFIG",
            what=f"not a JSON object: {str(error)[:120]}",
            where=path,
            next="repair or download it again",
        ) from None


def read_eos_ids(folder: Path, tokenizer: TextTokenizer) -> list[int]:
    """Ids that end what the model writes."""
    path = folder / "generation_config.json"
    ids = _read_object(path).get("eos_token_id") if path.is_file() else None
    if ids is None:
        ids = _read_object(folder / "config.json").get("eos_token_id")
    ids = [ids] if isinstance(ids, int) else list(ids or [])
    return sorted({*ids, tokenizer.end_of_text_id, tokenizer.end_of_turn_id})

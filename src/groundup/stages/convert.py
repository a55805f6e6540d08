"""`groundup convert`: MiniMind's .pth weights as a model directory; the pickle is read by a process of its own."""

import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, equal

from groundup.base.errors import CheckpointError, ConfigError
from groundup.base.files import write_json
from groundup.base.log import Log
from groundup.checkpoint import pth_reader
from groundup.checkpoint.huggingface import load_weights, read_model_config, save_model
from groundup.model.causal_lm import CausalLM
from groundup.stages.models import padding_words, placed_whole, refuse_used
from groundup.tokenizer.bpe import TextTokenizer

TIMEOUT_SECONDS = 1000.0
HEADS = 8
"""MiniMind's number of heads in every size; needed only where no norm of a head tells its size."""
ASSUMED = {"rope_theta": 1e6, "rms_norm_eps": 1e-6, "max_position_embeddings": 32768}
"""What no tensor tells: MiniMind's own values."""
COMPUTED = ("freqs_cos", "freqs_sin", ".inv_freq")
"""Tables that some versions store and every model computes."""


def convert(source: Path, target: Path, tokenizer_folder: Path, log: Log) -> Path:
    """Write the weights of `source` and a tokenizer as a Hugging Face directory.

    Raises CheckpointError for a file that holds more than tensors or is no model of MiniMind's, ConfigError for a
    tokenizer that does not fit.
    """
    if not source.is_file():
        raise ConfigError("E-MODEL-NONE", what="no such file", where=source, next="give MiniMind's .pth file")
    refuse_used(target)
    tokenizer = TextTokenizer(tokenizer_folder)
    with tempfile.TemporaryDirectory() as folder:
        tensors = {
            name.removeprefix("_orig_mod."): tensor.float()
            for name, tensor in read_pth(source, Path(folder) / "weights.safetensors").items()
            if not name.endswith(COMPUTED)
        }
        values = infer_config(tensors, source)
        write_json(Path(folder) / "config.json", values)
        shape = read_model_config(Path(folder))
    rows = values["vocab_size"]
    if tokenizer.vocab_size > rows:
        raise ConfigError(
            "E-TOKENIZER-MISMATCH",
            what=f"the tokenizer has {tokenizer.vocab_size} ids, the model {rows} rows",
            where=tokenizer_folder,
            next="give the tokenizer the model was trained with",
        )
    model = CausalLM(shape)
    load_weights(model, tensors, source)
    ends = [tokenizer.end_of_turn_id, tokenizer.end_of_text_id]
    with placed_whole(target) as folder_of_model:
        save_model(folder_of_model, model.config, model.named_parameters(), tokenizer, eos_token_ids=ends)
    padding = rows - tokenizer.vocab_size
    log.say(
        f"{values['model_type']}: {model.num_parameters():,} parameters, hidden {values['hidden_size']}, "
        f"{values['num_hidden_layers']} layers, {values['num_attention_heads']} heads of {values['head_dim']} "
        f"({values['num_key_value_heads']} of keys and values), {rows} rows"
        + (f"; {padding_words(padding)}" if padding else "")
    )
    log.say("taken as MiniMind's, for no tensor tells: " + ", ".join(f"{name} {ASSUMED[name]:g}" for name in ASSUMED))
    return target


def read_pth(source: Path, target: Path) -> dict[str, Tensor]:
    """Tensors of a .pth, read by `checkpoint/pth_reader.py` in a process with limits and no environment."""
    command = [sys.executable, "-I", pth_reader.__file__, str(source.resolve()), str(target)]
    try:
        ended = subprocess.run(
            command, capture_output=True, text=True, env={}, cwd=target.parent, timeout=TIMEOUT_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise _refused(source, f"not read within {TIMEOUT_SECONDS:.0f} s") from None
    if ended.returncode != 0 or not target.is_file():
        lines = ended.stderr.strip().splitlines()
        raise _refused(source, lines[-1] if lines else f"the reader ended with status {ended.returncode}")
    return load_file(target)


def _refused(source: Path, why: str) -> CheckpointError:
    return CheckpointError(
        "E-CKPT-FORMAT",
        what=f"pickle refused, it cannot be read as tensors alone: {why[:240]}",
        where=source,
        next="trust no file that holds more than tensors; save its state dict again",
    )


def infer_config(tensors: Mapping[str, Tensor], where: Path) -> dict[str, Any]:
    """config.json of MiniMind's weights, read off their shapes. Raises CheckpointError for other weights."""
    try:
        return _shape_of(tensors)
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(
            "E-KEYS",
            what=f"no model of MiniMind's in the layout of Hugging Face: {error} among {len(tensors)} tensors such as "
            f"{sorted(tensors)[:2]}",
            where=where,
            next="give a model's weights, neither an adapter's nor those of another project",
        ) from None


def _shape_of(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    rows, hidden_size = tensors["model.embed_tokens.weight"].shape
    layers = {int(match[1]) for name in tensors if (match := re.match(r"model\.layers\.(\d+)\.", name))}
    first = "model.layers.0."
    q_size = tensors[first + "self_attn.q_proj.weight"].shape[0]
    kv_size = tensors[first + "self_attn.k_proj.weight"].shape[0]
    norm = tensors.get(first + "self_attn.q_norm.weight")
    head_dim = norm.shape[0] if norm is not None else q_size // HEADS
    head = tensors.get("lm_head.weight")
    values: dict[str, Any] = {
        "model_type": "qwen3" if norm is not None else "llama",
        "hidden_size": hidden_size,
        "num_hidden_layers": max(layers) + 1,
        "num_attention_heads": q_size // head_dim,
        "num_key_value_heads": kv_size // head_dim,
        "head_dim": head_dim,
        "vocab_size": rows,
        "tie_word_embeddings": head is None or equal(head, tensors["model.embed_tokens.weight"]),
        "hidden_act": "silu",
        **ASSUMED,
    }
    experts = {int(match[1]) for name in tensors if (match := re.match(first + r"mlp\.experts\.(\d+)\.", name))}
    if not experts:
        return values | {"intermediate_size": tensors[first + "mlp.gate_proj.weight"].shape[0]}
    size = tensors[first + "mlp.experts.0.gate_proj.weight"].shape[0]
    return values | {
        "model_type": "qwen3_moe",
        "intermediate_size": size,
        "moe_intermediate_size": size,
        "num_experts": max(experts) + 1,
        "num_experts_per_tok": 1,
        "norm_topk_prob": True,
    }

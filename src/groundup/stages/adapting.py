"""What a fine-tuning stage does to a model before it trains: packed, adapted, its new tokens given a row."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor

from groundup.adapters.config import AdapterConfig
from groundup.adapters.files import load_adapter_weights, read_adapter, save_adapter
from groundup.adapters.lora import PissaStart, inject_lora, target_modules, weights_of_targets
from groundup.adapters.quantised import quantise_linears
from groundup.adapters.targets import choose_targets
from groundup.base.errors import CheckpointError, ConfigError
from groundup.base.files import write_json
from groundup.base.piece import Weights
from groundup.base.seeding import derive_seed
from groundup.checkpoint.huggingface import copy_tokenizer, read_model_config
from groundup.model.causal_lm import CausalLM
from groundup.stages.chat_data import chat_encoder_of
from groundup.stages.config import FinetuneConfig
from groundup.stages.models import refuse_other_tokenizer, tokenizer_of_adapter
from groundup.stages.work import Work
from groundup.tokenizer.bpe import TextTokenizer
from groundup.tokenizer.chat import ChatEncoder

START_FILE = "adapter_start.safetensors"
TOKENIZER_FOLDER = "tokenizer"


@dataclass(frozen=True)
class Adaptation:
    """What has to be known at the end of a run to write its adapter."""

    config: AdapterConfig
    targets: list[str]
    token_ids: list[int]
    tokenizer: TextTokenizer
    start: PissaStart | None
    figures: dict[str, float]

    def save(self, folder: Path, weights: Mapping[str, Tensor], *, base_hash: str, template: str) -> None:
        """Write the adapter's directory: peft's two files, the chat template, and the tokenizer if it has new tokens."""
        config, tensors = self.config, dict(weights)
        if self.start is not None:
            config, tensors = self.start.config_as_lora(config), self.start.as_lora(tensors)
        save_adapter(
            folder, config, tensors, targets=self.targets, base_hash=base_hash, token_ids=sorted(self.token_ids)
        )
        if self.tokenizer.folder.name == TOKENIZER_FOLDER and self.tokenizer.folder.parent == folder.parent:
            copy_tokenizer(
                self.tokenizer.folder, folder, eos_token_id=self.tokenizer.end_of_turn_id, tokenizer=self.tokenizer
            )
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def with_new_tokens(
    work: Work, config: FinetuneConfig, folder: Path, tokenizer: TextTokenizer, rows: int
) -> TextTokenizer:
    """The tokenizer with every token of `train_tokens`; one that is new gets the next free row of the embedding.

    Raises ConfigError if no row is free.
    """
    new = _new_tokens(config, tokenizer)
    if not new:
        return tokenizer
    target = folder / TOKENIZER_FOLDER
    if work.world.is_first:
        _write_with(new, tokenizer, target, rows)
    work.world.barrier()
    return TextTokenizer(target)


def encoder_in_training(config: FinetuneConfig, base: Path) -> ChatEncoder:
    """The encoder that training on a base uses, every token of `train_tokens` known; nothing stays on the disk.

    Raises ConfigError if no row is free for a new one.
    """
    encoder = chat_encoder_of(config, base)
    new = _new_tokens(config, encoder.tokenizer)
    if not new:
        return encoder
    rows = read_model_config(base).vocab_size
    assert rows != "auto", "a directory says how many rows there are"
    with TemporaryDirectory() as folder:
        _write_with(new, encoder.tokenizer, Path(folder), rows)
        return ChatEncoder(TextTokenizer(Path(folder)), encoder.template)


def _new_tokens(config: FinetuneConfig, tokenizer: TextTokenizer) -> list[str]:
    return [token for token in config.train_tokens if tokenizer.tokenizer.token_to_id(token) is None]


def _write_with(new: list[str], tokenizer: TextTokenizer, target: Path, rows: int) -> None:
    """Write the directory of a tokenizer with new tokens. Raises ConfigError if they have no row."""
    if tokenizer.vocab_size + len(new) > rows:
        raise ConfigError(
            "E-TOKENS-ROOM",
            what=f"{len(new)} new tokens in train_tokens, but the tokenizer has {tokenizer.vocab_size} ids and the "
            f"embedding {rows} rows",
            where=new[0],
            next="begin with a model whose vocab_size leaves free rows, or train tokens that the tokenizer has",
        )
    target.mkdir(exist_ok=True)
    copy_tokenizer(tokenizer.folder, target, eos_token_id=tokenizer.end_of_turn_id, tokenizer=tokenizer)
    data = json.loads((tokenizer.folder / "tokenizer.json").read_bytes())
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    for index, token in enumerate(new, tokenizer.vocab_size):
        data["added_tokens"].append({"id": index, "content": token, **plain})
    write_json(target / "tokenizer.json", data)


def adapt(
    work: Work,
    stage: str,
    config: FinetuneConfig,
    model: CausalLM,
    folder: Path,
    tokenizer: TextTokenizer,
    inputs: Mapping[str, str],
    base: Weights | None,
) -> Adaptation | None:
    """Put the section's adapter onto a model, in place; None where every weight is trained. `base` gives what is made out of a
    base on the meta device its values.

    Raises ConfigError for an adapter that fits no layer, and for a first one of another tokenizer; CheckpointError for one
    of another base.
    """
    if config.adapter == "none":
        return None
    figures: dict[str, float] = {}
    if config.adapter == "qlora":
        choose_targets(model, config.lora_targets)
        account = quantise_linears(model, config.nf4_maker, base)
        work.log.say(f"{stage}  {account.words()}")
        figures = {
            "quantised_parameters": account.num_packed,
            "quantised_bytes": account.packed_bytes,
            "quantised_bytes_a_parameter": account.bytes_a_parameter,
            "other_parameters": account.num_others,
            "other_bytes": account.other_bytes,
            "layers_left_unpacked": len(account.left),
        }
    vocabulary = tokenizer.tokenizer.get_vocab(with_added_tokens=True)
    token_ids = [vocabulary[token] for token in config.train_tokens]
    weights = weights_of_targets(model, config) if config.is_pissa else {}
    seed = derive_seed(work.recipe.seed, stage, "adapter")
    inject_lora(model, config, seed=seed, token_ids=sorted(token_ids), base=base)
    start = None
    if config.is_pissa:
        start = PissaStart(model, weights, folder / START_FILE, writes=work.world.is_first)
        work.world.barrier()
    if config.adapter_from is not None:
        _go_on_from(Path(config.adapter_from), config, token_ids, model, inputs)
    return Adaptation(config, target_modules(model), token_ids, tokenizer, start, figures)


def _go_on_from(
    adapter: Path, config: FinetuneConfig, token_ids: list[int], model: CausalLM, inputs: Mapping[str, str]
) -> None:
    """Take up a finished adapter's tensors."""
    saved, base_hash = read_adapter(adapter), inputs["base"]
    if saved.base_hash is not None and saved.base_hash != base_hash:
        raise CheckpointError(
            "E-ADAPTER-BASE",
            what=f"the adapter was trained on the base {saved.base_hash[:12]}…, this one is {base_hash[:12]}…",
            where=adapter,
            next="set init_from to the base it was trained on, or init_from to the merged model without adapter_from",
        )
    refuse_other_tokenizer(inputs["tokenizer"], tokenizer_of_adapter(adapter), adapter)
    shape = {
        name: (getattr(saved.config, name), getattr(config, name))
        for name in ("lora_rank", "lora_alpha", "use_rslora", "use_dora")
    } | {"train_tokens (ids)": (sorted(saved.token_ids), sorted(token_ids))}
    for name, (theirs, ours) in shape.items():
        if theirs != ours:
            raise ConfigError(
                "E-ADAPTER-SHAPE",
                what=f"{name} of the first adapter is {theirs!r}, of this stage {ours!r}",
                where=adapter,
                next="give both the same, or merge the first adapter and begin with the merged model",
            )
    load_adapter_weights(model, adapter)

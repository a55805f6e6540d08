"""MiniMind's flags, read into a recipe of groundup's stages.

What its users know stays: names, defaults, jsonl formats, `{save_dir}/{save_weight}_{hidden_size}`, AdamW with a
cosine to a tenth and no warmup. What differs, for the better: documents and chats are packed with walls instead of
padded and cut, rows that cannot be used are set aside and counted, 1 % of the rows (at least one) are held out for a
validation loss, and models are Hugging Face directories of safetensors. groundup's own recipes (`groundup quickstart`)
learn faster: Muon, warmup, decay of matrices only.
"""

import argparse
import difflib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from groundup.base import machine
from groundup.base.errors import CheckpointError, ConfigError, Preempted
from groundup.base.files import read_json
from groundup.cli import errors_as_lines

HERE = Path(__file__).resolve().parent
HEADS, KV_HEADS = 8, 4
VOCAB_SIZE = 6400
SEED = 42
HELD_OUT = 0.01
LORA_RANK = 16
MODEL_TYPES = ("qwen3", "qwen3_moe")
"""By --use_moe."""
EXPERTS, EXPERTS_A_TOKEN, BALANCE = 4, 1, 5e-4
FP16_ON_A_CPU = "--dtype float16: on a CPU it is about 100 times slower than float32"


@dataclass(frozen=True)
class Door:
    """One of MiniMind's scripts: the stage behind it, and the defaults in which the scripts differ."""

    stage: Literal["pretrain", "sft", "lora"]
    about: str
    name_flag: str
    """The flag that names what is saved."""
    name: str
    epochs: int
    batch_size: int
    learning_rate: float
    accumulation_steps: int
    log_interval: int
    max_seq_len: int
    data: str
    from_weight: str


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: "):
            unknown = message.split()[2].partition("=")[0]
            nearest = difflib.get_close_matches(unknown, self._option_string_actions, n=1, cutoff=0.4)
            raise ConfigError(
                "E-CLI",
                what=f"unknown flag {unknown!r}",
                next=f"did you mean {nearest[0]}?" if nearest else "see --help",
            )
        raise ConfigError("E-CLI", what=message, next="see --help")


def _above_zero(kind: type[int] | type[float]) -> Callable[[str], float]:
    def number(text: str) -> float:
        value = kind(text)
        if not 0 < value < math.inf:
            raise ValueError
        return value

    number.__name__ = f"{kind.__name__} above 0"
    return number


def make_parser(door: Door) -> argparse.ArgumentParser:
    """The flags of one door, in MiniMind's order."""
    parser = _Parser(description=door.about, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    count, size = _above_zero(int), _above_zero(float)
    add = parser.add_argument
    add("--save_dir", type=Path, default=HERE / "../out", help="folder of models")
    add(f"--{door.name_flag}", dest="name", default=door.name, help="first part of the model's name")
    add("--epochs", type=count, default=door.epochs)
    add("--batch_size", type=count, default=door.batch_size, help="rows in one forward pass")
    add("--learning_rate", type=size, default=door.learning_rate)
    add("--device", default="auto", help="cpu or cuda:0; auto takes CUDA where torch sees it")
    add(
        "--dtype",
        default="bfloat16",
        help="bfloat16, float16 (CUDA) or float32, of the products; weights stay in float32",
    )
    add("--num_workers", type=int, default=8, help="processes that clean and tokenize large files, at most one a core")
    add("--accumulation_steps", type=count, default=door.accumulation_steps, help="forward passes in a step")
    add("--grad_clip", type=size, default=1.0, help="largest norm of the gradients")
    add("--log_interval", type=count, default=door.log_interval, help="forward passes from line to line")
    add("--save_interval", type=count, default=1000, help="forward passes from checkpoint to checkpoint")
    add("--hidden_size", type=count, default=768)
    add("--num_hidden_layers", type=count, default=8)
    add("--max_seq_len", type=count, default=door.max_seq_len, help="tokens in a row")
    add("--use_moe", type=int, choices=(0, 1), default=0, help="1 trains 4 experts in every layer, one for a token")
    data = "jsonl of {text}, or a tokens/ folder" if door.stage == "pretrain" else "jsonl of {conversations}"
    add("--data_path", type=Path, default=HERE / door.data, help=data)
    add("--from_weight", default=door.from_weight, help="model in save_dir to begin with")
    add("--from_resume", type=int, choices=(0, 1), default=0, help="1 goes on from the last checkpoint, 0 begins again")
    add("--use_wandb", action="store_true", help="refused: groundup sends nothing anywhere")
    add("--wandb_project", help="refused, as --use_wandb is")
    add("--use_compile", type=int, choices=(0, 1), default=0, help="torch.compile per block")
    if door.stage == "pretrain":
        words = f"tokenizer directory; without it, one of {VOCAB_SIZE:,} ids is trained on the data"
        add("--tokenizer", type=Path, help=words)
    return parser


def open_door(door: Door, arguments: Sequence[str] | None = None) -> None:
    """Parse, run the stages, place the model and say how to go on; an error is one line and an exit code."""
    machine.prepare_process()
    with errors_as_lines(), _in_words_of_the_door():
        flags = make_parser(door).parse_args(arguments)
        refuse(flags)
        _run(door, flags)


@contextmanager
def _in_words_of_the_door() -> Iterator[None]:
    """Errors that name another command line's flags name the door's."""
    try:
        yield
    except Preempted as stop:
        again = "run the same command with --from_resume 1 to go on"
        raise Preempted(stop.code, what=stop.what, where=stop.where, next=again) from None
    except ConfigError as error:
        if error.code != "E-STAGE-CHANGED":
            raise
        again = "give the flags it began with, or begin again with --from_resume 0"
        raise ConfigError(error.code, what=error.what, where=error.where, next=again) from None


def refuse(flags: argparse.Namespace) -> None:
    """Raise ConfigError for what MiniMind has and groundup has not, with what works instead."""
    faults = [
        (
            flags.use_wandb or flags.wandb_project is not None,
            "--use_wandb: groundup sends nothing over the network",
            "leave it out: all figures are in metrics.jsonl, and `groundup report` draws them",
        ),
        (
            flags.dtype == "float16" and flags.device == "cpu",
            FP16_ON_A_CPU,
            "use --dtype bfloat16 or float32",
        ),
        (
            flags.dtype not in ("float16", "bfloat16", "float32"),
            f"--dtype {flags.dtype!r} is unknown",
            "use --dtype bfloat16, float16 or float32",
        ),
        (
            flags.device not in ("auto", "cpu", "cuda", "cuda:0"),
            f"--device {flags.device!r} cannot be chosen",
            "use cpu or cuda:0; another card is chosen by CUDA_VISIBLE_DEVICES",
        ),
        (flags.num_workers < 0, f"--num_workers {flags.num_workers} is below 0", "use 0 for one process"),
        (
            flags.use_compile == 1 and flags.device == "cpu" and not machine.has_compiler(),
            "--use_compile 1: there is no C++ compiler",
            "install g++, or use --use_compile 0",
        ),
    ]
    for is_fault, what, advice in faults:
        if is_fault:
            raise ConfigError("E-FLAG", what=what, next=advice)


def _run(door: Door, flags: argparse.Namespace) -> None:
    # late: torch and the stages, which --help and a refused flag do without
    from groundup.base.artifact import ChangePolicy, RunFolder
    from groundup.base.log import Log
    from groundup.parallel.world import World
    from groundup.stages.models import place_model
    from groundup.stages.run import run_stages
    from groundup.stages.work import Work

    world = World.from_environment()
    log = Log(quiet=not world.is_first)
    name = _model_name(flags.name, flags)
    recipe = make_recipe(door, flags, log)
    target, folder = flags.save_dir / name, flags.save_dir / ".groundup" / name
    if target.exists() and not folder.exists():
        raise ConfigError(
            "E-OUT-FOREIGN",
            what="something stands where the model would go, and no run in .groundup/ made it",
            where=target,
            next=f"give another --{door.name_flag} or --save_dir",
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    run = RunFolder(folder)
    if door.stage == "pretrain":
        data = ("tokenizer", "tokenize") if recipe.tokens.path else ("clean", "tokenizer", "tokenize")
        run_stages(Work(recipe, run, log, world=world), data)
    run_stages(Work(recipe, run, log, ChangePolicy(restart=not flags.from_resume), world), (door.stage,))
    if not world.is_first:
        return
    if door.stage == "lora":
        run_stages(Work(recipe, run, log), ("merge",))
    place_model(
        folder / door.stage / "model", target, adapter=folder / "lora" / "adapter" if door.stage == "lora" else None
    )
    _say_how_to_go_on(door, flags, log, target, folder)


def _say_how_to_go_on(door: Door, flags: argparse.Namespace, log: Any, target: Path, folder: Path) -> None:
    following = {"pretrain": "train_full_sft.py", "sft": "train_lora.py"}.get(door.stage)
    log.say(f"\nmodel  {target}" + ("  (adapter in adapter/)" if door.stage == "lora" else ""))
    if following is not None:
        sizes = f"--hidden_size {flags.hidden_size} --num_hidden_layers {flags.num_hidden_layers}"
        sizes += " --use_moe 1" if flags.use_moe else ""
        log.say(f"  python trainer/{following} --from_weight {flags.name} {sizes} --save_dir {flags.save_dir}")
    log.say(f'  groundup generate {target} "Once"' if door.stage == "pretrain" else f"  groundup chat {target}")
    log.say(f"  groundup report {folder}")


def _model_name(weight: str, flags: argparse.Namespace) -> str:
    """The folder of a model, as MiniMind names its file."""
    return f"{weight}_{flags.hidden_size}{'_moe' if flags.use_moe else ''}"


def make_recipe(door: Door, flags: argparse.Namespace, log: Any) -> Any:
    """The recipe that the flags stand for."""
    from groundup.base.config import validate
    from groundup.stages.recipe import Recipe

    training = _training(flags, log)
    values: dict[str, Any] = {"name": _model_name(flags.name, flags), "seed": SEED}
    if door.stage == "pretrain":
        if flags.from_weight != "none":
            raise ConfigError(
                "E-FLAG",
                what=f"--from_weight {flags.from_weight}: pretraining begins with random weights",
                next="leave it out; a finished model goes on in train_full_sft.py",
            )
        values |= _text(flags) | {"model": _shape(flags), "pretrain": training}
    else:
        base = _base_model(flags)
        fine = {"data": str(flags.data_path), "init_from": str(base), "validation_fraction": HELD_OUT}
        if door.stage == "lora":
            # MiniMind adds B A x unscaled, to square matrices only
            scale_one = {"lora_rank": LORA_RANK, "lora_alpha": LORA_RANK}
            fine |= {"adapter": "lora", "lora_targets": ["q_proj", "o_proj"], **scale_one}
        values[door.stage] = training | fine
    return validate(Recipe, values, where="command line", lines={})


def _text(flags: argparse.Namespace) -> dict[str, Any]:
    """The recipe's sections of text and tokens."""
    num_workers = "auto" if flags.num_workers >= machine.num_cores() else max(1, flags.num_workers)
    if any(flags.data_path.glob("train-*.tokens")):
        return {
            "tokens": {"path": str(flags.data_path)},
            "tokenizer": {"path": str(flags.tokenizer)} if flags.tokenizer else {},
        }
    return {
        # every row is trained on, as in MiniMind
        "corpus": {
            "source": str(flags.data_path),
            "dedup": {"exact": False, "near": False},
            "num_workers": num_workers,
        },
        "tokenizer": {"path": str(flags.tokenizer)} if flags.tokenizer else {"vocab_size": VOCAB_SIZE},
        "tokens": {"validation_fraction": HELD_OUT, "num_workers": num_workers},
    }


def _shape(flags: argparse.Namespace) -> dict[str, Any]:
    """MiniMind's shape of a width and a depth. Raises ConfigError for a width that its heads do not divide."""
    step = 2 * HEADS  # a head's size is even
    if flags.hidden_size % step:
        nearest = max(step, round(flags.hidden_size / step) * step)
        raise ConfigError(
            "E-FLAG",
            what=f"--hidden_size {flags.hidden_size} does not give {HEADS} heads of an even size",
            next=f"use {nearest}",
        )
    inner = math.ceil(flags.hidden_size * math.pi / 64) * 64
    experts = {
        "num_experts": EXPERTS,
        "num_experts_per_tok": EXPERTS_A_TOKEN,
        "moe_intermediate_size": inner,
        "router_aux_loss_coef": BALANCE,
    }
    return {
        "model_type": MODEL_TYPES[flags.use_moe],
        **(experts if flags.use_moe else {}),
        "hidden_size": flags.hidden_size,
        "intermediate_size": inner,
        "num_hidden_layers": flags.num_hidden_layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "rope_theta": 1e6,
        "max_position_embeddings": 32768,
    }


def _training(flags: argparse.Namespace, log: Any) -> dict[str, Any]:
    """The fields of a training section."""
    return {
        "duration": f"{flags.epochs} epochs",
        "row_length": flags.max_seq_len,
        "batch_size_tokens": flags.batch_size * flags.accumulation_steps * flags.max_seq_len,
        "micro_batch_rows": flags.batch_size,
        "optimizer": "adamw",
        "lr": flags.learning_rate,
        "betas": (0.9, 0.999),
        "weight_decay": 0.01,
        "schedule": "cosine",
        "warmup": "0 %",
        "lr_floor": 0.1,
        "max_grad_norm": flags.grad_clip,
        "device": flags.device.removesuffix(":0"),
        "precision": _precision(flags, log),
        "compile": bool(flags.use_compile),
        "log_every": f"{flags.log_interval * flags.batch_size} rows",
        "checkpoint_every": f"{flags.save_interval * flags.batch_size} rows",
    }


def _precision(flags: argparse.Namespace, log: Any) -> str:
    if flags.dtype == "float32":
        return "fp32"
    if flags.dtype == "float16":
        import torch

        if not torch.cuda.is_available():
            raise ConfigError("E-FLAG", what=FP16_ON_A_CPU, next="use --dtype bfloat16 or float32")
        return "fp16"
    if flags.device == "cpu" and not machine.has_fast_bf16():
        log.say("--dtype bfloat16 → float32: this CPU does not multiply bfloat16 in hardware")
        return "fp32"
    return "auto" if flags.device == "auto" else "bf16"


def _base_model(flags: argparse.Namespace) -> Path:
    """Directory of --from_weight. Raises ConfigError or CheckpointError if it cannot be the beginning of this run."""
    stem = _model_name(flags.from_weight, flags)
    folder: Path = flags.save_dir / stem
    if flags.from_weight == flags.name:
        raise ConfigError(
            "E-FLAG",
            what=f"the model would be written over the one it begins with, {folder}",
            next="give what is saved another name",
        )
    if not (folder / "config.json").is_file():
        given = Path(flags.from_weight)
        for path in (flags.save_dir / f"{stem}.pth", given, flags.save_dir / given):
            if path.suffix == ".pth" and path.is_file():
                raise CheckpointError(
                    "E-CKPT-FORMAT",
                    what=f"{path.name} is a pickle, which can run code: refused",
                    where=path.parent,
                    next=f"`groundup convert {path} --to {flags.save_dir / path.stem} --tokenizer DIR` makes a model of it; "
                    "or train it with the script before this one",
                )
        script = "train_full_sft.py" if flags.from_weight == "full_sft" else "train_pretrain.py"
        raise ConfigError(
            "E-MODEL-NONE",
            what=f"no model of --from_weight {flags.from_weight} and --hidden_size {flags.hidden_size}",
            where=folder,
            next=f"train it first with {script}, or give the name of one that is there",
        )
    config = read_json(folder / "config.json")
    for name in ("hidden_size", "num_hidden_layers"):
        if config.get(name) != getattr(flags, name):
            raise ConfigError(
                "E-FLAG",
                what=f"--{name} {getattr(flags, name)}, but the model has {config.get(name)}",
                where=folder,
                next=f"give --{name} {config.get(name)}",
            )
    if ("num_experts" in config) != bool(flags.use_moe):
        raise ConfigError(
            "E-FLAG",
            what=f"--use_moe {flags.use_moe}, but the model is a {config.get('model_type')}",
            where=folder,
            next=f"give --use_moe {1 - flags.use_moe}, or another --from_weight",
        )
    return folder

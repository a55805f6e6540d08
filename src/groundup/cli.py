"""The command line: one command a stage. Parses, calls, prints errors; torch is imported only by what runs."""

import math
import os
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, CycloptsError, Parameter

from groundup.base.errors import ConfigError, DataError, GroundupError, Preempted
from groundup.base.log import Log
from groundup.base.machine import prepare_process
from groundup.base.settings import section_help
from groundup.base.signals import stop_request
from groundup.parallel.rank import PEER_LOST, launcher_reports, tell_torchrun, was_started_again

app = App(
    name="groundup",
    help="Train language models from the ground up: raw text in, a chatting model out.",
    version_flags=["--version"],
    help_format="plaintext",
    result_action="return_value",
    suppress_keyboard_interrupt=False,
)

OS_ADVICE = "look at the path, who may use it, and the room on its disk; --debug shows where it was needed"

DryRun = Annotated[
    bool, Parameter(negative="", help="Tell what the stage will need (as `groundup plan` does), and begin nothing.")
]
Overrides = Annotated[str, Parameter(allow_leading_hyphen=True, show=False)]
RunsDir = Annotated[Path, Parameter(help="Folder that the runs stand in.")]
AllowChange = Annotated[
    tuple[str, ...], Parameter(negative="", help="Go on with an unfinished stage although this setting changed.")
]
Restart = Annotated[bool, Parameter(negative="", help="Begin the stage again.")]
Strict = Annotated[
    bool, Parameter(negative="", help="A damaged checkpoint ends with exit 4; else the one before it is taken.")
]
Exact = Annotated[
    bool, Parameter(negative="", help="Refuse to go on where the end could have other bits than an unbroken run's.")
]


def _overrides(tokens: Sequence[str]) -> list[tuple[str, str]]:
    """`--a.b value` and `--a.b=value` pairs. Raises ConfigError for anything else."""
    pairs: list[tuple[str, str]] = []
    rest = list(tokens)
    while rest:
        option = rest.pop(0)
        name, equals, value = option.removeprefix("--").partition("=")
        if not option.startswith("--") or not name:
            raise ConfigError(
                "E-CLI", what=f"do not understand {option!r}", next="settings are given as --section.key VALUE"
            )
        if not equals:
            if not rest:
                raise ConfigError("E-CLI", what=f"--{name} needs a value", next=f"write --{name} VALUE")
            value = rest.pop(0)
        pairs.append((name, value))
    return pairs


def _stage_help(*sections: str) -> str:
    """The recipe's settings of some sections, for a command's help."""
    rows = []
    for option, default, text in section_help("groundup.stages.recipe", "Recipe"):
        if option.removeprefix("--").split(".")[0] in sections:
            rows.append(f"  {option}  [{default}]")
            rows += textwrap.wrap(text, 100, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "Settings of the recipe, each can be given here:\n\n" + "\n".join(rows)


def _work(
    recipe: str,
    tokens: Sequence[str],
    runs_dir: Path,
    allow_change: Sequence[str] = (),
    restart: bool = False,
    *,
    trains: bool = False,
    strict: bool = False,
    exact: bool = False,
) -> Any:
    from groundup.base.artifact import ChangePolicy, RunFolder
    from groundup.parallel.world import World
    from groundup.stages.recipe import load_recipe
    from groundup.stages.work import Work

    loaded, world = load_recipe(recipe, _overrides(tokens)), World.from_environment()
    if trains:
        _refuse_accelerate(loaded)
    if trains and world.size == 1 and loaded.parallel.num_ranks > 1:
        raise _NeedsRanks(loaded.parallel)
    if trains:
        world.spread(loaded.parallel)
    log = Log(quiet=not world.is_first)
    policy = ChangePolicy(tuple(allow_change), restart)
    return Work(loaded, RunFolder(runs_dir / loaded.name), log, policy, world, is_strict=strict, is_exact=exact)


def _refuse_accelerate(recipe: Any) -> None:
    """Raise ConfigError where `accelerate launch` was told something else than the recipe says."""
    from groundup.parallel.accelerate_settings import refuse_contradiction

    for name in TRAINING_COMMANDS:
        section = getattr(recipe, name)
        if section is not None:
            refuse_contradiction(
                os.environ, name, precision=section.precision, device=section.device, compiles=section.compile
            )


class _NeedsRanks(Exception):
    """The command is to be run by several processes, which this one starts."""

    def __init__(self, config: Any) -> None:
        self.config = config


def _run_stage(stage: str, *arguments: Any, **options: Any) -> None:
    work = _work(*arguments, trains=stage in TRAINING_COMMANDS, **options)
    from groundup.stages.run import run_stages

    run_stages(work, (stage,))


STAGE_COMMANDS = {
    "clean": ("Clean and deduplicate text into corpus/.", ("corpus",)),
    "tokenizer": ("Train the tokenizer, or take an existing one.", ("tokenizer",)),
    "tokenize": ("Turn the corpus into token files.", ("tokens",)),
    "pretrain": ("Train a model from random weights.", ("pretrain", "model", "seed", "parallel")),
    "sft": ("Fine-tune on chats.", ("sft", "seed", "parallel")),
    "lora": ("Train an adapter on chats.", ("lora", "seed", "parallel")),
}


WORKING_COMMANDS = {*STAGE_COMMANDS, "run", "quickstart", "eval", "merge", "scale", "sweep"}
"""Commands that a signal asks to stop, so that the same command goes on."""


TRAINING_COMMANDS = ("pretrain", "sft", "lora")


def _stage_command(name: str) -> Callable[..., None]:
    def prepare(
        recipe: str,
        *settings: Overrides,
        runs_dir: RunsDir = Path("runs"),
        allow_change: AllowChange = (),
        restart: Restart = False,
    ) -> None:
        _run_stage(name, recipe, settings, runs_dir, allow_change, restart)

    def train(
        recipe: str,
        *settings: Overrides,
        runs_dir: RunsDir = Path("runs"),
        allow_change: AllowChange = (),
        restart: Restart = False,
        strict: Strict = False,
        exact: Exact = False,
        dry_run: DryRun = False,
    ) -> None:
        if dry_run:
            _plan(recipe, settings, runs_dir, stages=(name,))
            return
        _run_stage(name, recipe, settings, runs_dir, allow_change, restart, strict=strict, exact=exact)

    command = train if name in TRAINING_COMMANDS else prepare
    command.__doc__ = f"""{STAGE_COMMANDS[name][0]}

    Parameters
    ----------
    recipe
        A YAML file, a run's folder, or the name of a recipe that ships with groundup.
    """
    return command


for _name in STAGE_COMMANDS:
    app.command(_stage_command(_name), name=_name)


@app.command
def run(
    recipe: str,
    *settings: Overrides,
    runs_dir: RunsDir = Path("runs"),
    allow_change: AllowChange = (),
    restart: Restart = False,
    strict: Strict = False,
    exact: Exact = False,
) -> None:
    """Run every stage of a recipe; the same command again goes on.

    Parameters
    ----------
    recipe
        A YAML file, a run's folder, or the name of a recipe that ships with groundup.
    """
    work = _work(recipe, settings, runs_dir, allow_change, restart, trains=True, strict=strict, exact=exact)
    from groundup.stages.run import run_all

    run_all(work)


@app.command
def quickstart(
    *settings: Overrides,
    data: Path | None = None,
    runs_dir: RunsDir = Path("runs"),
    allow_change: AllowChange = (),
    restart: Restart = False,
    strict: Strict = False,
    exact: Exact = False,
) -> None:
    """Raw text to a chatting model in a few minutes, offline, on the Python library's own sources or your text.

    Parameters
    ----------
    data
        A file or folder of text to pretrain on, in place of the embedded text.
    """
    overrides: list[str] = list(settings)
    if data is not None:
        if not data.exists():
            raise ConfigError(
                "E-CONFIG-FILE", what="no such file or folder", where=data, next="give the path of your text"
            )
        stem = "".join(
            char if char.isascii() and (char.isalnum() or char in "._-") else "-" for char in data.resolve().stem
        )
        overrides += ["--corpus.source", str(data), "--name", f"quickstart-{stem.lstrip('.')[:50]}"]
    work = _work("quickstart", overrides, runs_dir, allow_change, restart, trains=True, strict=strict, exact=exact)
    from groundup.stages.quickstart import run_quickstart

    run_quickstart(work, has_own_data=data is not None)


def _plan(recipe: str, settings: Sequence[str], runs_dir: Path, **options: Any) -> None:
    from groundup.stages.recipe import load_recipe

    loaded = load_recipe(recipe, _overrides(settings))
    from groundup.insight.planning import plan_recipe

    plan_recipe(loaded, runs_dir, Log(), **options)


@app.command
def plan(
    recipe: str | None = None,
    *settings: Overrides,
    stage: Literal["all", "pretrain", "sft", "lora"] = "all",
    probe: bool = True,
    memory: str | None = None,
    watts: float | None = None,
    price_per_hour: float | None = None,
    budget: str | None = None,
    data: str | None = None,
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """What training will need: memory by part, tokens, FLOPs, disk, time; exit 7 if it does not fit, with what would.

    With --budget and without a recipe: which shape to train on how many tokens.

    Parameters
    ----------
    recipe
        A YAML file, a run's folder, or the name of a recipe that ships with groundup.
    stage
        The training stage to plan.
    probe
        Take a few real steps to tell the time.
    memory
        Memory to fit into, such as 8GB, in the place of this machine's.
    watts
        Power that the machine draws while it trains; tells the energy.
    price_per_hour
        What an hour of the machine costs; tells the price.
    budget
        What may be spent: 2h, 90min, 1e18FLOPs, or 50USD with --price-per-hour.
    data
        File, folder or glob of the text that there is for the budget; None takes it as endless.
    """
    _refuse_plan_options(recipe, budget, data=data, memory=memory, watts=watts, price_per_hour=price_per_hour)
    if budget is not None:
        from groundup.insight.budget_words import size_budget

        size_budget(budget, data, Log(), probes=probe, price_per_hour=price_per_hour)
        return
    assert recipe is not None
    from groundup.base.amounts import parse_bytes
    from groundup.insight.plan_words import Prices

    _plan(
        recipe,
        settings,
        runs_dir,
        stages=() if stage == "all" else (stage,),
        probes=probe,
        memory_bytes=None if memory is None else parse_bytes(memory),
        prices=Prices(watts, price_per_hour),
    )


def _refuse_plan_options(
    recipe: str | None,
    budget: str | None,
    *,
    data: str | None,
    memory: str | None,
    watts: float | None,
    price_per_hour: float | None,
) -> None:
    """What a plan cannot be made of. Raises ConfigError."""
    if (recipe is None) == (budget is None):
        raise ConfigError(
            "E-CLI", what="a plan is of a recipe or of a budget", next="give RECIPE or --budget, one of them"
        )
    owner, others = (
        ("--budget", {"--data": data}) if budget is None else ("RECIPE", {"--memory": memory, "--watts": watts})
    )
    for name in (name for name, value in others.items() if value is not None):
        raise ConfigError("E-CLI", what=f"{name} belongs to a plan of {owner}", next=f"leave it out, or give {owner}")
    for name, amount in {"--watts": watts, "--price-per-hour": price_per_hour}.items():
        if amount is not None and not 0 < amount < math.inf:
            raise ConfigError("E-CLI", what=f"{name} {amount:g} is no amount", next="give a number above 0")


@app.command
def scale(
    recipe: str,
    *settings: Overrides,
    time: str = "20m",
    budget: str | None = None,
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Run a ladder of small runs of a recipe, fit the law of its text, and foretell the full run; again = continue.

    Parameters
    ----------
    recipe
        A YAML file, a run's folder, or the name of a recipe that ships with groundup.
    time
        What the ladder may take on this machine: 90s, 20m, 3h.
    budget
        Operations, such as 1e15FLOPs, that the best size is told for; the recipe's own where it is not given.
    """
    work = _work(recipe, settings, runs_dir)
    from groundup.insight.budget import parse_time
    from groundup.insight.scale import scale_recipe

    scale_recipe(work, parse_time(time), budget=budget)


sweep_app = App(name="sweep", help="The same recipe with other choices, compared at equal operations.")
app.command(sweep_app)


@sweep_app.command(name="tokenizer")
def sweep_tokenizer(
    recipe: str,
    *settings: Overrides,
    sizes: str = "1024,2048,4096",
    time: str | None = None,
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Train a recipe with vocabularies of several sizes, each with the same operations; again = continue.

    Parameters
    ----------
    recipe
        A YAML file, a run's folder, or the name of a recipe that ships with groundup.
    sizes
        Sizes of the vocabulary, with commas between them.
    time
        What all of it may take on this machine, such as 20m; left out, every run has the recipe's own operations.
    """
    work = _work(recipe, settings, runs_dir)
    from groundup.insight.budget import parse_time
    from groundup.insight.sweep import sweep_vocabularies

    sweep_vocabularies(work, sizes, seconds=None if time is None else parse_time(time))


@app.command
def init(name: str, *, data: str, minutes: float = 10.0, chats: str | None = None, folder: Path = Path()) -> None:
    """Write a recipe for your own text, with sizes that fit it, this machine and a time.

    Parameters
    ----------
    name
        Name of the run; the recipe is NAME.yaml.
    data
        File, folder or glob of text.
    minutes
        Time of pretraining.
    chats
        File, folder or glob of chats to fine-tune on after it.
    folder
        Where the recipe is written.
    """
    from groundup.stages.starter import write_starter

    write_starter(name, data, minutes=minutes, chats=chats, folder=folder, log=Log())


@app.command(name="eval")
def evaluate(
    target: str,
    *settings: Overrides,
    text: str | None = None,
    text_field: str = "text",
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Measure the stages of a recipe, or a model on any text.

    Parameters
    ----------
    target
        A recipe; or, with --text, a model directory or a run.
    text
        File, folder or glob of text to measure the model on.
    text_field
        Name of the text's field in jsonl, json, csv and parquet rows.
    """
    if text is None:
        work = _work(target, settings, runs_dir)
        from groundup.stages.run import run_evaluations

        run_evaluations(work)
        return
    from groundup.stages.evaluate_text import evaluate_model_on

    evaluate_model_on(target, text, text_field, _overrides(settings), Log())


@app.command
def generate(
    model: str,
    prompt: str = "",
    *,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    max_new_tokens: int = 256,
    seed: int = 0,
) -> None:
    """Continue a text.

    Parameters
    ----------
    model
        A model directory, or a run: its last stage.
    prompt
        The text to continue.
    """
    config = _sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, max_new_tokens=max_new_tokens, seed=seed
    )
    from groundup.stages import models, talk

    talk.generate(models.find_model(model), prompt, config)


@app.command
def chat(
    model: str,
    *,
    system: str = "",
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    max_new_tokens: int = 256,
    seed: int = 0,
) -> None:
    """Talk with a model; Ctrl-C stops an answer, /new begins again, /exit leaves.

    Parameters
    ----------
    model
        A model directory, or a run: its last stage.
    system
        What the model is told before the chat.
    """
    config = _sampling(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, max_new_tokens=max_new_tokens, seed=seed
    )
    from groundup.stages import models, talk

    talk.chat(models.find_model(model), config, Log(), system=system)


def _sampling(**values: Any) -> Any:
    from groundup.base.config import validate
    from groundup.generate.config import SamplingConfig

    return validate(SamplingConfig, values, where="command line", lines={})


@app.command
def merge(
    target: str,
    *settings: Overrides,
    base: Path | None = None,
    to: Path | None = None,
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Merge an adapter into its full-precision base, proved by comparing logits.

    Parameters
    ----------
    target
        A recipe whose lora stage is finished; or, with --base and --to, an adapter's directory.
    base
        The model directory the adapter was trained on.
    to
        Where the merged model goes.
    """
    if base is None or to is None:
        if (Path(target) / "adapter_config.json").is_file():
            raise ConfigError("E-CLI", what="an adapter needs its base", next="give --base MODEL and --to FOLDER")
        work = _work(target, settings, runs_dir)
        from groundup.stages.run import run_stages

        run_stages(work, ("merge",))
        return
    from groundup.stages.merge import merge_adapter, merge_words
    from groundup.stages.models import find_model, placed_whole, refuse_used

    refuse_used(to)
    with placed_whole(to) as folder:
        figures = merge_adapter(Path(target), find_model(str(base)), folder)
    Log().say(f"merged into {to}  {merge_words(figures)}")


@app.command
def export(model: str, *, to: Path, dtype: str = "fp32") -> None:
    """Write a model as a Hugging Face directory.

    Parameters
    ----------
    model
        A model directory, or a run: its last stage.
    to
        A new folder.
    dtype
        fp32, bf16 or fp16.
    """
    from groundup.stages.models import export_model

    Log().say(f"exported to {export_model(model, to, dtype)}")


@app.command
def convert(file: Path, *, to: Path, tokenizer: Path) -> None:
    """Turn MiniMind's .pth weights into a model directory, without running what a pickle can hide.

    Parameters
    ----------
    file
        The .pth file; its shape is read off its tensors.
    to
        A new folder.
    tokenizer
        Directory of the tokenizer it was trained with.
    """
    from groundup.stages.convert import convert as convert_file

    log = Log()
    log.say(f"converted to {convert_file(file, to, tokenizer, log)}")


@app.command
def report(*runs: Path, to: Path | None = None) -> None:
    """Write a run's report.html, one self-contained page; of several runs, one page that lays their curves over each other.

    Parameters
    ----------
    runs
        Folders of runs.
    to
        The file to write: report.html in the run, or comparison.html in the first of several, where it is not given.
    """
    from groundup.stages.report import make_comparison, make_report

    if not runs:
        raise ConfigError("E-CLI", what="no run is named", next="give a run's folder, such as runs/quickstart")
    if len(runs) == 1:
        make_report(runs[0], Log(), to=to)
    else:
        make_comparison(runs, Log(), to=to)


@app.command
def watch(run: Path, *, every_seconds: float = 2.0, once: bool = False) -> None:
    """Live curves of a run at work, from another terminal; ends when its training ends.

    Parameters
    ----------
    run
        A run's folder.
    every_seconds
        Time between two looks at its files.
    once
        Show what there is and end.
    """
    from groundup.stages.watch import watch_run

    watch_run(run, Log(), every_seconds=every_seconds, is_once=once)


@app.command
def follow(run: Path, *, to: str, folder: Path | None = None, once: bool = False) -> None:
    """Send a run's figures, as they come, to a tracker that is installed; ends when its training ends.

    Parameters
    ----------
    run
        A run's folder.
    to
        tensorboard, trackio, wandb, swanlab or mlflow; none sends anything over the network.
    folder
        Where the tracker keeps its files: NAME/TRACKER in the run where it is not given.
    once
        Send what there is and end.
    """
    from groundup.stages.watch import follow_run

    follow_run(run, to, Log(), folder=folder, is_once=once)


inspect_app = App(name="inspect", help="What the model really sees: learned, ignored, borders, cuts.")
app.command(inspect_app)


@inspect_app.command(name="masks")
def inspect_masks(
    recipe: str,
    *settings: Overrides,
    stage: Literal["sft", "lora"] = "sft",
    count: int = 4,
    html: Path | None = None,
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Rows of chats, token by token: supervised, ignored, borders, ends of turns, cuts.

    Parameters
    ----------
    recipe
        A YAML file, a run's folder, or the name of a recipe that ships with groundup.
    stage
        Whose chats.
    count
        Rows to show.
    html
        Write a page instead.
    """
    work = _work(recipe, settings, runs_dir)
    from groundup.stages import inspect

    inspect.inspect_masks(work, stage, count=count, html=html)


@inspect_app.command(name="tokens")
def inspect_tokens(
    recipe: str,
    *settings: Overrides,
    count: int = 4,
    html: Path | None = None,
    runs_dir: RunsDir = Path("runs"),
) -> None:
    """Rows of pretraining, token by token: documents, borders, cuts.

    Parameters
    ----------
    recipe
        A YAML file, a run's folder, or the name of a recipe that ships with groundup.
    count
        Rows to show.
    html
        Write a page instead.
    """
    work = _work(recipe, settings, runs_dir)
    from groundup.stages import inspect

    inspect.inspect_tokens(work, count=count, html=html)


@app.command
def launch(
    recipe: str,
    *settings: Overrides,
    command: Literal["run", "pretrain", "sft", "lora"] = "run",
    nproc: int | None = None,
    nnodes: int = 1,
    node_rank: int | None = None,
    rdzv_endpoint: str = "",
    max_restarts: int | None = None,
    slurm: Annotated[bool, Parameter(negative="")] = False,
    submit: Annotated[bool, Parameter(negative="")] = False,
    rehearse: Annotated[bool, Parameter(negative="")] = False,
    world: int | None = None,
    memory: str | None = None,
    runs_dir: RunsDir = Path("runs"),
    allow_change: AllowChange = (),
    restart: Restart = False,
    strict: Strict = False,
    exact: Exact = False,
) -> None:
    """Run a recipe on several processes of this machine, or of several machines, on each of which this is started.

    Parameters
    ----------
    recipe
        A YAML file, a run's folder, or the name of a recipe that ships with groundup.
    command
        What every process runs.
    nproc
        Processes of each machine: one for each GPU. Left out: as many as the recipe's `parallel:` asks for.
    nnodes
        Machines.
    node_rank
        This machine's number, 0 on that of the end point; left out: found by the machine's name.
    rdzv_endpoint
        HOST:PORT at which several machines meet.
    max_restarts
        How often lost processes are started again; as --parallel.max_restarts.
    slurm
        Print the job for sbatch instead.
    submit
        Submit the job with sbatch instead.
    rehearse
        Start nothing of it: tell what each rank would hold, take and send, and run the mesh's kinds small on this CPU.
    world
        With --rehearse: the number of processes, without --nproc and --nnodes.
    memory
        With --rehearse: memory of a GPU, such as 80GB; exit 7 where a process needs more.
    """
    from groundup.stages.spread_run import plan_launch

    passed_on = [command, recipe, *settings]
    if runs_dir != Path("runs"):
        passed_on += ["--runs-dir", str(runs_dir)]
    for key in allow_change:
        passed_on += ["--allow-change", key]
    for option, is_set in (("--restart", restart), ("--strict", strict), ("--exact", exact)):
        passed_on += [option] * is_set
    if not rehearse and (world is not None or memory is not None):
        raise ConfigError(
            "E-CLI", what="--world and --memory belong to --rehearse", next="add --rehearse, or leave them out"
        )
    if world is not None:
        nproc, nnodes = _of_world(world, nproc, nnodes)
    plan = plan_launch(passed_on, _overrides(settings), nproc, nnodes, max_restarts)
    if rehearse:
        from groundup.base.amounts import parse_bytes
        from groundup.proof.spread.rehearse import rehearse as rehearse_recipe

        memory_bytes = None if memory is None else parse_bytes(memory)
        rehearse_recipe(plan.recipe, plan.parallel, Log(), num_local=plan.ranks_per_node, memory_bytes=memory_bytes)
        return
    if slurm or submit:
        from groundup.parallel.slurm import submit as submit_job

        script = plan.sbatch_script()
        print(submit_job(script) if submit else script.rstrip())
        return
    sys.exit(plan.run(Log(), rdzv_endpoint=rdzv_endpoint, node_rank=node_rank))


def _of_world(world: int, nproc: int | None, nnodes: int) -> tuple[int, int]:
    """Processes of each machine, and machines. Raises ConfigError for a number of processes that is said twice."""
    if nproc is not None or nnodes != 1:
        raise ConfigError("E-CLI", what="--world is --nproc times --nnodes", next="give one or the other")
    return world, 1


@app.command(name="verify-resume")
def verify_resume(
    recipe: str, *settings: Overrides, kills: int = 12, seed: int = 0, runs_dir: RunsDir = Path("runs")
) -> None:
    """Kill and resume a shrunk copy of a recipe on this machine, and compare the ends bit by bit.

    Parameters
    ----------
    recipe
        A YAML file, a run's folder, or the name of a recipe that ships with groundup.
    kills
        Kills of each training stage.
    seed
        Where the kills fall.
    """
    from groundup.stages.recipe import load_recipe

    loaded = load_recipe(recipe, _overrides(settings))
    from groundup.proof import verify_resume as proof

    proof.verify_resume(loaded, runs_dir, Log(), num_kills=kills, seed=seed)


doctor_app = App(name="doctor", help="What this machine is, what a run shows, and proofs.")
app.command(doctor_app)


@doctor_app.default
def doctor(target: str | None = None, *settings: Overrides, runs_dir: RunsDir = Path("runs")) -> None:
    """What this machine is and what groundup makes of it; what is wrong with a recipe before it trains; or what a run shows.

    Parameters
    ----------
    target
        A run's folder, finished or at work: what is wrong, why, and what to do next. Or a recipe: lengths against positions,
        ids against the vocabulary, labels against segments, data against batch and ranks.
    """
    if target is None:
        from groundup.proof.machine_check import check_machine

        check_machine(Log())
    elif Path(target).is_dir():
        from groundup.stages.report import say_diagnosis

        say_diagnosis(Path(target), Log())
    else:
        work = _work(target, settings, runs_dir)
        from groundup.stages.checkup import check_recipe

        check_recipe(work)


@doctor_app.command(name="numerics")
def doctor_numerics(recipe: str = "quickstart", *settings: Overrides, json: Path | None = None) -> None:
    """Prove on a recipe's model shape that what should change only the cost changes nothing; exit 5 if it does.

    Parameters
    ----------
    recipe
        A YAML file, a run's folder, or the name of a recipe that ships with groundup.
    json
        Write the results to this file too.
    """
    from groundup.stages.recipe import load_recipe

    loaded = load_recipe(recipe, _overrides(settings))
    from groundup.proof.numerics.table import doctor_numerics as proofs

    proofs(loaded, Log(), json_file=json)


@doctor_app.command(name="parallel")
def doctor_parallel(recipe: str = "quickstart", *settings: Overrides, json: Path | None = None) -> None:
    """Prove on a recipe's model shape that a model spread over processes trains as on one; exit 6 if it does not.

    Parameters
    ----------
    recipe
        A YAML file, a run's folder, or the name of a recipe that ships with groundup.
    json
        Write the results to this file too.
    """
    from groundup.stages.recipe import load_recipe

    loaded = load_recipe(recipe, _overrides(settings))
    from groundup.proof.spread.table import doctor_parallel as proofs

    proofs(loaded, Log(), json_file=json)


@doctor_app.command(name="net")
def doctor_net(nproc: int = 2, patience: float = 20.0) -> None:
    """Try the network between processes: meeting, latency, bandwidth, interfaces; exit 6 names the one that is wrong.

    Under torchrun, or the job of a scheduler, between the processes that it started; alone, between some of this machine.

    Parameters
    ----------
    nproc
        Alone: how many.
    patience
        Seconds after which a process that does not answer is named.
    """
    from groundup.parallel.net_check import check_net, refuse_slow, report_lines
    from groundup.parallel.world import World

    world = World.from_environment()
    if world.size == 1:
        from groundup.parallel.config import ParallelConfig

        if nproc < 2:
            raise ConfigError("E-CLI", what=f"--nproc {nproc}", next="give 2 or more: a network has two ends")
        raise _NeedsRanks(ParallelConfig(data_replicate=nproc, max_restarts=0))
    world.report(0)
    report = check_net(world, patience_seconds=patience)
    report_lines(report, Log(quiet=not world.is_first).say)
    refuse_slow(report)


@app.command(name="trial-server", show=False)
def trial_server(*imports: str) -> None:
    """What proofs start: runs the commands that it reads, each in a process of its own."""
    from groundup.proof.fork_server import serve

    serve(main, imports)


@contextmanager
def errors_as_lines(*, debug: bool = False) -> Iterator[None]:
    """Print an error that a person can mend as one line, and exit with its code."""
    try:
        yield
    except Preempted as preempted:
        _say_last(preempted.line())
        sys.exit(preempted.exit_code)
    except GroundupError as error:
        if debug:
            import traceback

            traceback.print_exc()
        _say_last(f"ERROR {error.line()}", has_lost_peer=error.code == PEER_LOST)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        stop = Preempted(
            "E-PREEMPTED",
            what="stopped; what was finished or saved before is kept",
            next="run the same command again to go on",
        )
        _say_last(stop.line())
        sys.exit(stop.exit_code)
    except BrokenPipeError:
        sys.exit(0)
    except OSError as error:
        if debug or error.filename is None:
            raise
        fault = DataError("E-OS", what=error.strerror or "cannot be used", where=error.filename, next=OS_ADVICE)
        _say_last(f"ERROR {fault.line()}")
        sys.exit(fault.exit_code)


def _say_last(text: str, *, has_lost_peer: bool = False) -> None:
    """To standard error; of several ranks only the one that failed first is heard, which their launcher knows."""
    reports = launcher_reports()
    if reports is None:
        tell_torchrun(text)
        print(text, file=sys.stderr, flush=True)
    else:
        reports.last_words(text, has_lost_peer=has_lost_peer)


@contextmanager
def _bugs_to_launcher() -> Iterator[None]:
    """The traceback of a rank goes the way of its errors; a process of its own prints it as ever."""
    try:
        yield
    except Exception:
        import traceback

        if launcher_reports() is None:
            tell_torchrun(traceback.format_exc().rstrip())
            raise
        _say_last(traceback.format_exc().rstrip())
        sys.exit(1)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits with the error's code."""
    launcher_reports()
    prepare_process()
    given = list(sys.argv[1:] if arguments is None else arguments)
    if was_started_again():
        given = [argument for argument in given if argument != "--restart"]
    try:
        _run_command(given)
    except _NeedsRanks as needs:
        from groundup.parallel.launch import launch

        sys.exit(launch([sys.executable, "-P", "-m", "groundup", *given], needs.config, Log()))


def _run_command(given: Sequence[str]) -> None:
    debug = "--debug" in given
    arguments = [argument for argument in given if argument != "--debug"]
    with _bugs_to_launcher(), errors_as_lines(debug=debug):
        try:
            with stop_request() if arguments and arguments[0] in WORKING_COMMANDS else nullcontext():
                app(arguments, exit_on_error=False, print_error=False)
            if "--help" in arguments and arguments[0] in STAGE_COMMANDS:
                # not through cyclopts: rendering so many lines there takes as long as everything else
                print(_stage_help(*STAGE_COMMANDS[arguments[0]][1]))
        except CycloptsError as error:
            words = " ".join(str(error).split()).partition(" Available commands:")[0]
            what, _, nearest = words.partition(" Did you mean ")
            advice = f"did you mean {nearest} See `groundup --help`" if nearest else "see `groundup --help`"
            raise ConfigError("E-CLI", what=what.rstrip("."), next=advice) from None

"""`variator serve`."""

import argparse
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from variator_jax.bench.arguments import positive, positives
from variator_jax.commands.registry import command
from variator_jax.errors import ConfigError, did_you_mean
from variator_jax.files import wrap_errors

if TYPE_CHECKING:
    from variator_jax.serving.sentences import Encoder
    from variator_jax.serving.tasks import TaskConfig
    from variator_jax.store import Plugin

TOKEN = "VARIATOR_TOKEN"


def _serve_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    result = "the quickstart's folder, which is served without --backbone (%(default)s)"
    add("--model_dir", metavar="DIR", default="runs/quickstart", help=result)
    add("--backbone", metavar="DIR", help="a backbone: Hugging Face, T5X, ours, or a run folder")
    plugins = "a plugin, a set of them or a run folder; repeatable. Without any, ratio 1 is served"
    add("--plugins", metavar="DIR", action="append", default=[], help=plugins)
    tasks = "JSON, a list of tasks with their prompts (docs/serving.md)"
    add("--tasks", metavar="FILE", help=tasks)
    target = "the p99 of latency to hold, in milliseconds (%(default)s)"
    add("--slo_ms", type=float, default=100.0, metavar="MS", help=target)
    longest = "tokens of the longest input (512, or the folder's; of the quickstart 64)"
    add("--max_length", type=positive, metavar="N", help=longest)
    rows = "inputs of the largest batch (64; of the quickstart 8). Fewer start sooner"
    add("--max_rows", type=positive, metavar="N", help=rows)
    mesh = "of several devices, as 1,1,4, which cuts the weights in four; by default one device"
    add("--mesh_shape", type=positives, metavar="DATA,FSDP,MODEL", help=mesh)
    cache = "where compiled programs are kept for the next start (%(default)s)"
    kept = os.environ.get("JAX_COMPILATION_CACHE_DIR", "~/.cache/variator_jax/programs")
    add("--cache", metavar="DIR", default=kept, help=cache)
    add("--name", help="the model's name in answers; by default that of the backbone")
    add("--host", default="127.0.0.1", help="0.0.0.0 for all interfaces (%(default)s)")
    add("--port", type=int, default=8080, help="0 for a free one (%(default)s)")
    token = f"a file whose first line is the bearer token; or the variable {TOKEN}"
    add("--token_file", metavar="FILE", help=token)


@command("serve", _serve_arguments)
def _serve(args: argparse.Namespace) -> None:
    """Serve a backbone over HTTP; the ratio follows the load. By default the quickstart's result.

    variator serve --slo_ms 100
    variator serve --backbone monot5 --plugins plugins --tasks tasks.json --slo_ms 100
    """
    try:
        from variator_jax.serving import engine, http, service
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error}: pip install 'variator_jax[serve]'.") from error
    import jax

    from variator_jax import mesh as meshes

    token = bearer_token(args.token_file)  # before the weights are loaded
    (backbone, dense, longest), plugins, tasks = load(args)
    # The next start on the same kind of machine reads programs and latencies from there.
    jax.config.update("jax_compilation_cache_dir", os.path.expanduser(args.cache))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    length, rows = (longest or 512, 64) if args.backbone else (64, 8)
    limits = engine.EngineLimits.up_to(args.max_length or length, args.max_rows or rows)
    shape, mesh = args.mesh_shape, None
    if shape is not None:
        # Rows of a batch are filled up, so any number of them will do.
        count = math.prod(shape)
        mesh = meshes.make_mesh(backbone.config, count, shape, jax.devices()[:count])
    loaded = engine.Engine(backbone, plugins, tasks, limits, dense, mesh)
    served = service.Service(loaded, args.slo_ms)
    name = args.name or backbone.config.name
    http.serve(http.create_app(served, name, token), args.host, args.port)


def load(args: argparse.Namespace) -> "tuple[Encoder, list[Plugin], list[TaskConfig]]":
    """The encoder, its plugins and tasks; the quickstart's without `--backbone`.

    Raises:
      VariatorError: if one of them is missing, damaged or does not fit.
    """
    from variator_jax.serving.sentences import load_encoder
    from variator_jax.serving.tasks import TaskConfig
    from variator_jax.store import load_plugins

    folders, tasks = list(args.plugins), read_tasks(args.tasks) if args.tasks else None
    path = args.backbone
    if path is None:
        quickstart = Path(args.model_dir)
        path = quickstart / "finetuned"
        if not path.is_dir():
            run = "run launch/quickstart.sh, or give --backbone"
            raise ConfigError(f"{path} does not exist: {run}.")
        folders = folders or sorted(map(str, quickstart.glob("adapted_*")))
        tasks = tasks or quickstart_tasks()
    encoder = load_encoder(path)
    plugins = [p for folder in folders for p in load_plugins(folder, encoder.backbone).values()]
    kinds = ["embed", *(["generate"] if encoder.backbone.config.has_decoder else [])]
    return encoder, plugins, tasks or [TaskConfig(kind, kind) for kind in kinds]


def quickstart_tasks() -> "list[TaskConfig]":
    """The tasks that the quickstart's backbone was fine-tuned on, and `embed`."""
    from variator_jax.serving.tasks import TaskConfig

    topics = ("standard", "numpy", "tensorflow", "jax", "matplotlib")
    pair = "First: {first} Second: {second}"
    return [
        TaskConfig("docs_topic", "classify", "Library? {text}", topics),
        TaskConfig("docs_pair", "classify", pair, ("no", "yes")),
        TaskConfig("docs_name", "generate", "Name: {text}", max_length=8),
        TaskConfig("embed", "embed"),
    ]


def read_tasks(path: str) -> "list[TaskConfig]":
    """The tasks of a JSON file.

    Raises:
      ConfigError: for anything but a list of tasks that can be served.
    """
    from pydantic import TypeAdapter, ValidationError

    from variator_jax.serving.tasks import TaskConfig

    fields = TaskConfig.__dataclass_fields__
    with wrap_errors(f"{path} cannot be read", ConfigError):
        text = Path(path).read_text(encoding="utf-8")
    try:
        found = TypeAdapter(list[dict[str, Any]]).validate_json(text, strict=True)
        if unknown := [name for task in found for name in task if name not in fields]:
            reason = f"has no setting {unknown[0]!r}; those are {', '.join(fields)}"
            raise ConfigError(f"A task {reason}.{did_you_mean(unknown[0], fields)}")
        tasks = TypeAdapter(list[TaskConfig]).validate_json(text, strict=True)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except ValidationError as error:
        one = error.errors()[0]
        place, expected = ".".join(map(str, one["loc"])) or "the file", one["msg"]
        reason = f"{place}: {expected}; found {one['input']!r:.60}"
        raise ConfigError(f"{path} is no list of tasks: {reason}.") from error
    if not tasks:
        raise ConfigError(f"{path} has no tasks.")
    return tasks


def bearer_token(path: str | None = None) -> str | None:
    """The bearer token, which is not an argument, because those are seen by every user."""
    if path is None:
        given = os.environ.get(TOKEN)
        if given is not None and not given.strip():
            raise ConfigError(f"{TOKEN} is set, but empty: unset it for a server without a token.")
        return given and given.strip()
    with wrap_errors(f"{path} cannot be read", ConfigError):
        token = Path(path).read_text(encoding="utf-8").partition("\n")[0].strip()
    if not token:
        raise ConfigError(f"{path} holds no token in its first line.")
    return token

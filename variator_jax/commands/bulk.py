"""The commands beside the server: bulk encoding, export for JAX, and the load test."""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from variator_jax.bench.arguments import positive, positives
from variator_jax.commands.registry import command, listed
from variator_jax.errors import ConfigError, PluginError, did_you_mean
from variator_jax.files import local_path, make_output

if TYPE_CHECKING:
    from variator_jax.store import Backbone, Plugin

_BACKBONE = "a backbone or run folder, a Hugging Face folder or a T5X checkpoint"


def _encode_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    rows = "a .jsonl file (objects, or texts) or a .txt file (a text a line), also with .gz"
    add("--input", required=True, metavar="FILE", help=rows)
    files = "where encoded-000000.safetensors, ... go; the same command resumes there"
    add("--output", required=True, metavar="DIR", help=files)
    add("--backbone", required=True, metavar="DIR", help=_BACKBONE)
    add("--plugins", metavar="DIR", help="a plugin, a set of plugins, or a run folder")
    add("--plugin", metavar="NAME", help="which of several plugins, such as span_x4")
    add("--ratio", type=int, metavar="K", help="in place of a name; 1 for the backbone itself")
    add("--field", default="text", help="the text's field in a .jsonl object (default: text)")
    add("--prompt", default="{text}", help="what surrounds a text, such as 'query: {text}'")
    vectors = "mean: a vector a text; none: a vector a token (default: mean)"
    add("--pooling", default="mean", help=vectors)
    whole = "leave a pooled vector at its length; by default it gets the length 1"
    add("--no_normalize", action="store_true", help=whole)
    add("--dtype", default="float32", help="of the vectors: float32 or bf16 (default: float32)")
    longest = "tokens of the longest text, end included; longer ones are bad rows "
    longest += "(default: 512, or what a folder of sentence-transformers has)"
    add("--max_length", type=positive, metavar="N", help=longest)
    add("--truncate", action="store_true", help="cut longer texts, and count them")
    window = "rows that are sorted by length together, and go to one file (default: 2048)"
    add("--window", type=positive, default=2048, metavar="N", help=window)
    tokens = "tokens of a batch, padding included (default: 4096)"
    add("--batch_tokens", type=positive, default=4096, metavar="N", help=tokens)


@command("encode", _encode_arguments)
def _encode(args: argparse.Namespace) -> None:
    """Encode a file of texts with a backbone and a plugin; a run that was killed resumes.

    variator encode --backbone runs/quickstart/finetuned --input texts.jsonl --output encoded
    variator encode --backbone flan_t5_xl --plugins plugins --plugin span_x4 --pooling none \
        --dtype bf16 --input captions.txt --output captions
    """
    import jax

    from variator_jax import mesh as meshes
    from variator_jax.serving.bulk import BulkSettings, encode_file
    from variator_jax.serving.rows import Texts
    from variator_jax.serving.sentences import load_encoder

    output = local_path("--output", args.output)
    encoder = load_encoder(args.backbone)
    longest = (encoder.max_length or 512) if args.max_length is None else args.max_length
    texts = Texts(args.field, args.prompt, longest, args.truncate)
    dtype = {"bf16": "bfloat16", "f32": "float32"}.get(args.dtype, args.dtype)
    shape = (not args.no_normalize, dtype, args.window, args.batch_tokens)
    settings = BulkSettings(texts, args.pooling, *shape)
    plugin = _choose(args, encoder.backbone)
    mesh = meshes.mesh_or_none(encoder.backbone.config, jax.device_count(), None)
    total = encode_file(Path(args.input), output, encoder, plugin, settings, mesh)
    print(
        f"{args.output}: {total.rows:,} rows, {total.tokens:,} tokens, {total.bad:,} bad rows, "
        f"{total.cut:,} cut texts"
    )


def _choose(args: argparse.Namespace, backbone: "Backbone") -> "Plugin | None":
    """The plugin that the arguments name; None for the backbone itself."""
    from variator_jax.store import load_plugins

    asked = args.plugin, args.ratio
    if asked == (None, 1) or (args.plugins is None and asked == (None, None)):
        return None
    if args.plugins is None:
        raise PluginError("--plugin and --ratio choose among --plugins DIR, which is missing.")
    plugins = load_plugins(args.plugins, backbone).values()
    fitting = [
        plugin
        for plugin in plugins
        if args.plugin in (None, plugin.config.name) and args.ratio in (None, plugin.config.ratio)
    ]
    if len(fitting) != 1:
        names = [plugin.config.name for plugin in plugins]
        near = did_you_mean(args.plugin, names) if args.plugin else ""
        choice = f"name one with --plugin: {', '.join(names)}.{near}"
        raise PluginError(f"{len(fitting)} plugins of {args.plugins} fit; {choice}")
    return fitting[0]


def _load_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--url", help="the server (default: http://127.0.0.1:8080); its token is VARIATOR_TOKEN")
    add("--route", metavar="NAME", help="embed (the default), rerank or predict")
    shapes = "steady (default), burst (--peak in the middle third), ramp (from --rate to --peak)"
    add("--shape", metavar="NAME", help=shapes)
    add("--rate", type=float, metavar="R", help="requests a second (default: 10)")
    add("--peak", type=float, metavar="R", help="of burst and ramp (default: 3 x --rate)")
    add("--seconds", type=float, metavar="S", help="how long requests leave (default: 60)")
    add("--target_ms", type=float, default=100.0, metavar="MS", help="target of p99 (default: 100)")
    add("--words", type=int, metavar="N", help="of a random text (default: 40)")
    add("--texts", metavar="FILE", help="a text a line, in place of random ones")
    add("--documents", type=int, metavar="N", help="texts of a request to rerank (default: 8)")
    named = "the plugin that requests name, or none; by default they name none and the task decides"
    add("--plugin", metavar="NAME", help=named)
    add("--timeout", type=float, metavar="S", help="of an answer (default: 60)")
    add("--seed", type=int, help="of arrivals and texts (default: 0)")
    search = "find the highest rate that holds the target, by bisection over runs of --seconds"
    add("--search", action="store_true", help=search)
    against = "with --search: first the same for requests that name this plugin, and the quotient"
    add("--against", metavar="NAME", help=against)
    written = "write loadtest.json, loadtest.md and loadtest.png there (not with --search)"
    add("--output", metavar="DIR", help=written)


@command("loadtest", _load_arguments)
def _loadtest(args: argparse.Namespace) -> None:
    """Send random traffic to a server: goodput, p50, p99 and ratio over time.

    variator loadtest --rate 20 --target_ms 100 --output load
    variator loadtest --route predict --shape ramp --rate 5 --peak 60 --texts texts.txt
    variator loadtest --route predict --search --against none --target_ms 500
    """
    import dataclasses

    from variator_jax.commands.serving import bearer_token

    try:
        from variator_jax.serving import loadreport
        from variator_jax.serving.loadtest import Load, run
    except ModuleNotFoundError as error:
        raise ConfigError(f"{error}: pip install 'variator_jax[serve]'.") from error

    names = {field.name for field in dataclasses.fields(Load)}
    given = {k: v for k, v in vars(args).items() if k in names and v is not None}
    # As for `serve`: other users of the machine see arguments.
    load = Load(token=bearer_token(), **given)
    if args.against and not args.search:
        raise ConfigError("--against goes with --search.")
    if args.search:
        print(loadreport.compare(load, args.target_ms, args.against).markdown())
        return
    if args.output:
        make_output("--output", args.output)
    result = run(load)
    print(loadreport.markdown(result, load, args.target_ms))
    if args.output:
        loadreport.write(result, load, args.target_ms, Path(args.output))


_JAX_EXPORT: dict[str, tuple[str, Callable[[str], Any], str]] = {
    "backbone": ("DIR", str, _BACKBONE),
    "plugins": ("DIR", str, "its plugins; 'none', the backbone itself, is always exported"),
    "output": ("DIR", str, "the folder to write"),
    "task": ("TASK", str, "encode (a vector a token) or embed (their mean, of length 1; default)"),
    "batches": ("1,8", positives, "rows of a batch"),
    "lengths": ("64,256", positives, "tokens of a row"),
    "platforms": ("cpu,tpu", listed, "by default that of this machine; also cuda, rocm"),
}


def export_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds those of `variator export` that T5X's export has not."""
    formats = "jax: programs that run without this package (default: savedmodel, with T5X)"
    parser.add_argument("--format", choices=("savedmodel", "jax"), help=formats)
    group = parser.add_argument_group("with --format jax")
    for name, (metavar, kind, text) in _JAX_EXPORT.items():
        group.add_argument(f"--{name}", metavar=metavar, type=kind, help=text)


def export_jax(args: argparse.Namespace) -> bool:
    """Exports for JAX where --format is jax; returns whether it is.

    Raises:
      ConfigError: for arguments of the other format.
    """
    given = {name: value for name in _JAX_EXPORT if (value := getattr(args, name)) is not None}
    if args.format != "jax":
        if given:
            raise ConfigError(f"--{min(given)} goes with --format jax.")
        return False
    if args.gin_file or args.bindings or args.dry_run or args.check:
        raise ConfigError("--format jax takes no gin files, and has neither --dry_run nor --check.")
    if missing := {"backbone", "output"} - given.keys():
        raise ConfigError(f"--format jax needs --{min(missing)} DIR.")
    from variator_jax.serving.export import ExportSettings, export_programs
    from variator_jax.serving.sentences import load_encoder
    from variator_jax.store import load_plugins

    output = local_path("--output", given["output"])
    encoder = load_encoder(given["backbone"])
    plugins = load_plugins(given["plugins"], encoder.backbone) if "plugins" in given else {}
    longest = encoder.max_length or max(ExportSettings.lengths)
    lengths = tuple({min(length, longest): None for length in ExportSettings.lengths})
    asked = {name: given[name] for name in given.keys() - {"backbone", "plugins", "output"}}
    settings = ExportSettings(**{"lengths": lengths, **asked})
    written = export_programs(output, encoder, plugins.values(), settings)
    print(f"{given['output']}: {len(written)} programs")
    return True

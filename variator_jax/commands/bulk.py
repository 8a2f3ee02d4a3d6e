"""The commands beside the server: bulk encoding, export for JAX, and the load test."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from variator_jax.commands.registry import command
from variator_jax.errors import ConfigError, PluginError, did_you_mean

if TYPE_CHECKING:
    from variator_jax.store import Backbone, Plugin


def _encode_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    rows = "a .jsonl file (objects, or texts) or a .txt file (a text a line), also with .gz"
    add("--input", required=True, metavar="FILE", help=rows)
    files = "where encoded-00000.safetensors, ... go; the same command resumes there"
    add("--output", required=True, metavar="DIR", help=files)
    add("--backbone", required=True, metavar="DIR", help="a backbone or run folder, or another's")
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
    longest = "tokens of the longest text, end included; longer ones are bad rows (default: 512)"
    add("--max_length", type=int, default=512, metavar="N", help=longest)
    add("--truncate", action="store_true", help="cut longer texts, and count them")
    window = "rows that are sorted by length together, and go to one file (default: 2048)"
    add("--window", type=int, default=2048, metavar="N", help=window)
    tokens = "tokens of a batch, padding included (default: 4096)"
    add("--batch_tokens", type=int, default=4096, metavar="N", help=tokens)


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
    from variator_jax.store import load_backbone

    texts = Texts(args.field, args.prompt, args.max_length, args.truncate)
    dtype = {"bf16": "bfloat16", "f32": "float32"}.get(args.dtype, args.dtype)
    shape = (not args.no_normalize, dtype, args.window, args.batch_tokens)
    settings = BulkSettings(texts, args.pooling, *shape)
    backbone = load_backbone(args.backbone)
    plugin = _choose(args, backbone)
    mesh = meshes.mesh_or_none(backbone.config, jax.device_count(), None)
    total = encode_file(Path(args.input), Path(args.output), backbone, plugin, settings, mesh)
    print(
        f"{args.output}: {total.rows:,} rows, {total.tokens:,} tokens, {total.bad:,} bad rows, "
        f"{total.cut:,} cut texts"
    )


def _choose(args: argparse.Namespace, backbone: "Backbone") -> "Plugin | None":
    """The plugin that the arguments name; None for the backbone itself."""
    from variator_jax.store import load_plugins

    if args.ratio == 1 and args.plugin is None:
        return None
    if args.plugins is None:
        if args.plugin or args.ratio:
            raise PluginError("--plugin and --ratio choose among --plugins DIR, which is missing.")
        return None
    plugins = load_plugins(args.plugins, backbone).values()
    fitting = [
        plugin
        for plugin in plugins
        if args.plugin in (None, plugin.config.name) and args.ratio in (None, plugin.config.ratio)
    ]
    if len(fitting) != 1:
        names = [plugin.config.name for plugin in plugins]
        near = did_you_mean(args.plugin, names) if args.plugin else ""
        raise PluginError(
            f"{len(fitting)} plugins of {args.plugins} fit; name one with --plugin: "
            f"{', '.join(names)}.{near}"
        )
    return fitting[0]


_JAX_EXPORT = {
    "backbone": ("DIR", "a backbone or run folder, or another's"),
    "plugins": ("DIR", "its plugins; 'none', the backbone itself, is always exported"),
    "output": ("DIR", "the folder to write"),
    "task": ("TASK", "encode (a vector a token) or embed (their mean, of length 1; the default)"),
    "batches": ("1,8", "rows of a batch"),
    "lengths": ("64,256", "tokens of a row"),
    "platforms": ("cpu,tpu", "by default that of this machine; also cuda, rocm"),
}


def export_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds those of `variator export` that T5X's export has not."""
    formats = "jax: programs that run without this package (default: savedmodel, with T5X)"
    parser.add_argument("--format", choices=("savedmodel", "jax"), help=formats)
    group = parser.add_argument_group("with --format jax")
    for name, (metavar, text) in _JAX_EXPORT.items():
        group.add_argument(f"--{name}", metavar=metavar, help=text)


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
    if args.gin_file or args.bindings:
        raise ConfigError("--format jax takes no gin files.")
    if missing := {"backbone", "output"} - given.keys():
        raise ConfigError(f"--format jax needs --{min(missing)} DIR.")
    from variator_jax.serving.export import ExportSettings, export_programs
    from variator_jax.store import load_backbone, load_plugins

    folders = {name: given.pop(name, None) for name in ("backbone", "plugins", "output")}
    backbone = load_backbone(folders["backbone"])
    plugins = load_plugins(folders["plugins"], backbone) if folders["plugins"] else {}
    sizes = {
        name: _numbers(name, given.pop(name)) for name in ("batches", "lengths") if name in given
    }
    if "platforms" in given:
        given["platforms"] = tuple(given["platforms"].split(","))
    settings = ExportSettings(**given, **sizes)
    written = export_programs(folders["output"], backbone, plugins.values(), settings)
    print(f"{folders['output']}: {len(written)} programs")
    return True


def _numbers(name: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(map(int, text.split(",")))
    except ValueError as error:
        raise ConfigError(f"--{name} {text}: expected whole numbers, such as 1,8.") from error

"""`variator convert`: which conversion the options ask for, and a few lines on what was made."""

from __future__ import annotations

from variator_jax.errors import ConfigError, did_you_mean
from variator_jax.store import convert

PLUGINS = ("official", "t5x-run")  # sources of plugin folders
SOURCES = (*convert.FORMATS, *PLUGINS)


def run(
    source: str,
    target: str | None,
    path: str,
    destination: str,
    *,
    dtype: str | None,
    scan: bool,
    backbone: str | None,
    residual_scale: float,
) -> str:
    """The command: converts, and says in a few lines what was made.

    Raises:
      ConfigError: for options that do not go together.
      CheckpointError: if `path` is damaged or of another format, or `destination` is in use.
    """
    if source not in SOURCES:
        raise ConfigError(
            f"--from {source} is no format, only {', '.join(SOURCES)} are."
            f"{did_you_mean(source, SOURCES)}"
        )
    if target is None and source != "t5x-run":
        raise ConfigError(
            f"--to is missing: what DST becomes, one of {', '.join(convert.FORMATS)}."
        )
    if source not in PLUGINS:
        if backbone is not None:
            raise ConfigError(f"--backbone goes with --from {' or '.join(PLUGINS)} only.")
        return _backbone(source, target or "", path, destination, dtype, scan)
    if target not in ("variator", None) or dtype is not None or scan:
        raise ConfigError(
            f"--from {source} makes a plugin folder: it goes with --to variator, and with neither "
            "--dtype nor --scan."
        )
    return _plugin(source, path, destination, backbone, residual_scale)


def _backbone(
    source: str, target: str, path: str, destination: str, dtype: str | None, scan: bool
) -> str:
    made, name, summary = convert.convert(source, target, path, destination, dtype, scan)
    return "\n".join(
        [
            f"backbone {name} in {made}",
            f"  leaves:      {summary.leaves}",
            f"  bytes:       {summary.bytes:,}",
            f"  dtype:       {summary.dtype}",
            f"  fingerprint: {summary.fingerprint}",
            f"  seconds:     {summary.seconds:.1f}",
        ]
    )


def _plugin(
    source: str, path: str, destination: str, backbone: str | None, residual_scale: float
) -> str:
    if source == "official" and backbone is None:
        raise ConfigError("--from official needs --backbone PATH, the plugin's backbone.")
    from variator_jax.store import convert_plugin, inspect

    if backbone is not None and source == "official":
        made = convert_plugin.convert_official(path, destination, backbone, residual_scale)
    else:
        made = convert_plugin.convert_t5x_run(path, destination, backbone)
    return inspect.describe(made)

"""Hugging Face's T5 encoder in torch, as it comes and through `torch.compile`, for comparison.

The same shape, tokens, dtype and threads as ours, random weights, no gradients. What cannot run is
returned with the reason. torch and transformers are imported only here, and only when asked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from variator_jax.backbones.t5.config import T5Config
from variator_jax.bench.encoder import Peer
from variator_jax.bench.hardware import usable_cores

EAGER = "transformers, eager"
COMPILED = "transformers, torch.compile"
# What says where a checkpoint comes from, and no shape.
_NO_SHAPE = ("architectures", "model_type", "_name_or_path", "dtype", "torch_dtype")


def start_peers(config: T5Config, tokens: np.ndarray) -> list[Peer]:
    """Both peers on `tokens` `[batch, length]`, each run once already or with why it cannot."""
    try:
        device = _torch_device()
        model, inputs = _encoder(config, device), _tensor(tokens, device)
    except Exception as error:  # Whatever fails in others' code is told, and ours is still timed.
        return [(name, None, _reason(error)) for name in (EAGER, COMPILED)]
    return [
        _started(EAGER, lambda: model, inputs),
        _started(COMPILED, lambda: _compile(model), inputs),
    ]


def transformers_config(config: T5Config) -> Any:
    """Their `T5Config` of the same shape, without dropout."""
    import transformers

    from variator_jax.store.hugging_face import render_config

    theirs = {k: v for k, v in render_config(config).items() if k not in _NO_SHAPE}
    # An encoder has no cache, and no logits to tie.
    return transformers.T5Config(**{**theirs, "dropout_rate": 0.0, "use_cache": False})


def _encoder(config: T5Config, device: str) -> Any:
    import torch
    import transformers

    if device == "cuda":
        # JAX multiplies float32 matrices in TF32 on GPUs unless told otherwise; so shall torch.
        torch.set_float32_matmul_precision("high")
    else:
        torch.set_num_threads(usable_cores())
    with torch.device(device):
        model = transformers.T5EncoderModel(transformers_config(config))
    return model.to(getattr(torch, config.dtype)).eval()


def _compile(model: Any) -> Any:
    import torch

    return torch.compile(model, dynamic=False)


def _started(name: str, build: Callable[[], Any], inputs: Any) -> Peer:
    """The peer with its call, after a first one; or with the reason why that failed."""
    import torch

    def call() -> None:
        with torch.no_grad():
            model(input_ids=inputs)
        if inputs.is_cuda:
            torch.cuda.synchronize()

    try:
        model = build()
        call()
    except Exception as error:  # As above.
        return name, None, _reason(error)
    return name, call, ""


def _tensor(tokens: np.ndarray, device: str) -> Any:
    import torch

    return torch.as_tensor(tokens, dtype=torch.long, device=device)


def _torch_device() -> str:
    """The device that JAX runs on, in torch's words.

    Raises:
      RuntimeError: if torch cannot use it.
    """
    import torch

    platform = jax.devices()[0].platform
    if platform == "cpu":
        return "cpu"
    if platform in ("gpu", "cuda", "rocm") and torch.cuda.is_available():
        return "cuda"
    raise RuntimeError(f"JAX runs on {platform}, and this torch {torch.__version__} cannot")


def _reason(error: Exception) -> str:
    """The kind of the error and the first line of what it says."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__

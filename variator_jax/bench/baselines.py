"""Hugging Face's T5 encoder in torch, eager and through `torch.compile`, as baselines.

The same shape, tokens, dtype and threads as ours, random weights, no gradients. What cannot run is
returned with the reason. torch and transformers are imported only here, and only when asked.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from variator_jax.backbones.t5.config import T5Config
from variator_jax.bench.output import usable_cores

EAGER = "transformers, eager"
COMPILED = "transformers, torch.compile"
#: A baseline's call, or the reason why it has none.
Baseline = Callable[[], object] | str
# Fields of a checkpoint's config that do not describe its shape.
_NO_SHAPE = ("architectures", "model_type", "_name_or_path", "dtype", "torch_dtype")


def start_baselines(config: T5Config, tokens: np.ndarray) -> dict[str, Baseline]:
    """Both baselines on `tokens` `[batch, length]`, each run once already."""
    try:
        model, inputs = _encoder(config, tokens)
    except Exception as error:  # Any failure of other libraries is reported, ours still timed.
        return dict.fromkeys((EAGER, COMPILED), _reason(error))
    return {
        EAGER: _started(lambda: model, inputs),
        COMPILED: _started(lambda: _compile(model), inputs),
    }


def transformers_config(config: T5Config) -> Any:
    """Their `T5Config` of the same shape, without dropout."""
    import transformers

    from variator_jax.store.hugging_face import render_config

    theirs = {k: v for k, v in render_config(config).items() if k not in _NO_SHAPE}
    # An encoder has no cache.
    return transformers.T5Config(**{**theirs, "dropout_rate": 0.0, "use_cache": False})


def _encoder(config: T5Config, tokens: np.ndarray) -> tuple[Any, Any]:
    """The module and its input on the device that JAX runs on.

    Raises:
      RuntimeError: if torch cannot use that device.
    """
    import torch
    import transformers

    platform = jax.devices()[0].platform
    if platform == "cpu":
        device = "cpu"
        torch.set_num_threads(usable_cores())
    elif platform in ("gpu", "cuda", "rocm") and torch.cuda.is_available():
        device = "cuda"
        # JAX multiplies float32 matrices in TF32 on GPUs by default; so does torch here.
        torch.set_float32_matmul_precision("high")
    else:
        raise RuntimeError(f"JAX runs on {platform}, and this torch {torch.__version__} cannot")
    with torch.device(device):
        model = transformers.T5EncoderModel(transformers_config(config))
    inputs = torch.as_tensor(tokens, dtype=torch.long, device=device)
    return model.to(getattr(torch, config.dtype)).eval(), inputs


def _compile(model: Any) -> Any:
    import torch

    return torch.compile(model, dynamic=False)


def _started(build: Callable[[], Any], inputs: Any) -> Baseline:
    """The call, after a first one; or the reason why that failed."""
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
        return _reason(error)
    return call


def _reason(error: Exception) -> str:
    """The kind of an error and the first line of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__

"""Packaging of variator_jax: the library, its gin configurations, the command `variator`."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
CONFIGS = "variator_jax.gin_configs"

# Lower bounds are the oldest versions that were tried; the newest were jax 0.12.0 and flax
# 0.12.12, on Python 3.12 and 3.13. Upper bounds are set only where a newer release can break us.
# `jax` has no extra: `pip install "jax[cuda12]"` or `"jax[tpu]"` chooses the accelerator.
CORE = [
    "absl-py>=2.5",
    "flax>=0.12.8",
    "gin-config>=0.5.0,<0.6",  # gin_utils reads gin's tables, which are not public.
    "jax>=0.10.2",
    "ml_dtypes>=0.6",
    "msgpack>=1.2.4",
    "numpy>=2.4",
    "optax>=0.2.8",
    "orbax-checkpoint>=0.12.8",
    "safetensors>=0.8",
    "tensorstore>=0.1.86",
]

# seqio brings TensorFlow in the release that tensorflow-text pins. Adding tensorflow-cpu would
# unpack a second distribution over the same files; uninstalling either would break the other.
TRAIN = [
    "matplotlib>=3.11",
    "pandas>=3.1",
    "sentencepiece>=0.2.3",
    "seqio>=0.0.20",
    "tensorflow-datasets>=4.9.10",
    "tokenizers>=0.23",  # tokenizer.json of Hugging Face folders
    "tabulate>=0.10",  # pandas.DataFrame.to_markdown
    "tensorboard>=2.20",
    "tqdm>=4.70",
]

SERVE = [
    "fastapi>=0.165",
    "httpx>=0.28",  # the load test
    "prometheus-client>=0.26",
    "protobuf",  # with sentencepiece, as in texts.py
    "sentencepiece>=0.2.3",
    "tokenizers>=0.23",
    "uvicorn>=0.54",
]

DEV = [
    "hypothesis>=6.170",
    "mypy>=2.4",
    "pytest>=9.2",
    "openai>=3.57",  # a client of the server's tests; others are skipped where they are absent
    "pytest-xdist>=3.8",
    "ruff>=0.17",
    "setuptools",  # builds the wheel of tests/imports_test.py, with wheel
    "wheel",
    # Only the tests compare with these; the library reads and writes their files without them.
    "torch==2.13.0",
    "transformers>=5.23,<6",
]


def version() -> str:
    source = (ROOT / "variator_jax" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "(.+)"$', source, re.MULTILINE)
    if not match:
        raise ValueError("variator_jax/__init__.py sets no __version__")
    return match[1]


def long_description() -> str:
    readme = ROOT / "README.md"
    return readme.read_text(encoding="utf-8") if readme.is_file() else ""


setup(
    name="variator_jax",
    version=version(),
    description="Plug-and-play compression plugins that make frozen T5 encoders cheap, in JAX",
    long_description=long_description(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["variator_jax", "variator_jax.*"]),
        "variator_jax.gin_configs",
    ],
    package_dir={"variator_jax.gin_configs": "gin_configs"},
    package_data={
        "variator_jax.gin_configs": ["*.gin", "**/*.gin"],
        "variator_jax.serving": ["page.html"],
    },
    install_requires=CORE,
    extras_require={"train": TRAIN, "serve": SERVE, "dev": TRAIN + SERVE + DEV},
    entry_points={
        "console_scripts": [
            "variator = variator_jax.cli:main",
            # Upstream T5X installs no command.
            "t5x = variator_jax.cli:t5x",
        ]
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)

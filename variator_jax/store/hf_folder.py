"""Hugging Face folders in and out: `config.json`, weights in one or many files, `spiece.model`.

Names and transposes are in `hf.py`, settings in `hf_config.py`. Nothing here needs transformers or
torch.
"""

from __future__ import annotations

import json
import os
import pathlib
import re
import shutil
from collections.abc import Iterable
from typing import Any

import numpy as np

from variator_jax.errors import CheckpointError
from variator_jax.store import dtypes, folders, hf, hf_config, hf_weights, safetensors_file, stream
from variator_jax.store.backbone_folder import VOCABULARY, Backbone
from variator_jax.store.hf_weights import Weight
from variator_jax.store.stream import Leaf, Source

CONFIG, GENERATION = "config.json", "generation_config.json"
SHARD_SIZE = 5 * 10**9  # bytes; transformers' own
_SHARD = r"model-\d{5}-of-\d{5}\.safetensors"
_EMBEDDING, _HEAD = "token_embedder/embedding", "decoder/logits_dense/kernel"


def load_hf(path: str | os.PathLike, dtype: Any = None) -> Backbone:
    """Reads a folder of a T5, Flan-T5, mT5 or ByT5, with its decoder or an encoder alone.

    Args:
      path: a folder with `config.json` and `model.safetensors` or `pytorch_model.bin`, whole or in
        shards with an index.
      dtype: what the weights are cast to; None keeps what the file has.

    Raises:
      CheckpointError: if anything is missing, damaged or not a T5 of this network.
    """
    return stream.collect(open_hf(path), dtype)


def open_hf(path: str | os.PathLike) -> Source:
    """The leaves of a folder, by their headers; `load_hf` says which folders."""
    folder = pathlib.Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"There is no folder {folder}.")
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} is no Hugging Face folder: there is no {CONFIG} in it.")
    content = hf_weights.read_json(folder / CONFIG)
    weights = hf_weights.find_weights(folder)
    table = _embedding(folder, weights, tied=content.get("tie_word_embeddings") is not False)
    described = hf_config.parse(str(folder / CONFIG), content, table.shape[0])
    config, leaves = described.config, []
    for weight in weights.values():
        leaf = _named(weight)
        if leaf is not None and leaf[0] not in (_EMBEDDING, _HEAD):
            leaves.append(_leaf(weight, *leaf))
    leaves.append(_leaf(table, _EMBEDDING, False))
    head = _output(folder, weights, table, described)
    if head is not None:
        leaves.append(_leaf(head, _HEAD, True))
    vocabulary = folder / VOCABULARY
    return stream.checked_source(
        str(folder), config, leaves, vocabulary if vocabulary.is_file() else None, hf.name_of
    )


def save_hf(path: str | os.PathLike, backbone: Backbone, shard_size: int = SHARD_SIZE) -> None:
    """Writes a folder that opens in transformers, whole or not at all.

    Args:
      path: a new folder, or one that this function wrote, which is replaced.
      backbone: with a decoder, or an encoder alone.
      shard_size: bytes; beyond them the weights are split over several files with an index.

    Raises:
      CheckpointError: if the folder is another one, or transformers has no such T5.
    """
    folder = pathlib.Path(path)
    if folder.exists() and not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder} exists and is no Hugging Face folder; it is left alone.")
    written = (GENERATION, hf_weights.WEIGHTS, hf_weights.INDEX, VOCABULARY)
    holds = (*map(re.escape, written), _SHARD)
    with folders.atomic_folder(folder, replaces=(CONFIG,), holds=holds) as draft:
        write(draft, stream.backbone_source(folder, backbone), shard_size=shard_size)


def write(
    draft: pathlib.Path,
    source: Source,
    dtype: np.dtype | None = None,
    *,
    shard_size: int = SHARD_SIZE,
    progress: Any = None,
) -> stream.Summary:
    """Fills an empty folder from a source, one leaf in memory at a time."""
    config = dtypes.cast_config(source.config, dtype)
    content = hf_config.render(config)
    sizes = {leaf.path: dtype or leaf.dtype for leaf in source.leaves}
    shards = _shards(source.leaves, sizes, shard_size)
    names = (
        [hf_weights.WEIGHTS]
        if len(shards) == 1
        else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    )
    writers: dict[str, tuple[str, safetensors_file.Writer]] = {}
    for file, leaves in zip(names, shards, strict=True):
        arrays = {hf.name_of(x.path): (_theirs(x.path, x.shape), sizes[x.path]) for x in leaves}
        writer = safetensors_file.Writer(draft / file, arrays, {"format": "pt"})
        writers |= {leaf.path: (file, writer) for leaf in leaves}

    def sink(leaf_path: str, array: np.ndarray) -> None:
        transposed = array.T if hf.is_transposed(leaf_path) else array
        writers[leaf_path][1].write(hf.name_of(leaf_path), transposed)

    summary = stream.copy(source, sink, dtype, progress)
    for writer in {id(writer): writer for _, writer in writers.values()}.values():
        writer.close()
    if len(shards) > 1:
        weight_map = {hf.name_of(leaf_path): file for leaf_path, (file, _) in writers.items()}
        index = {"metadata": {"total_size": summary.bytes}, "weight_map": weight_map}
        _write_json(draft / hf_weights.INDEX, index)
    if source.vocabulary_file is not None:
        shutil.copyfile(source.vocabulary_file, draft / VOCABULARY)
    tokens = {key: content[key] for key in content if key.endswith("_token_id")}
    if config.has_decoder:
        _write_json(draft / GENERATION, tokens)
    _write_json(draft / CONFIG, content)
    return summary


def _theirs(path: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[::-1] if hf.is_transposed(path) else shape


def _shards(leaves: Iterable[Leaf], dtypes: dict[str, np.dtype], limit: int) -> list[list[Leaf]]:
    """Leaves in their order, as many a shard as its size allows."""
    shards: list[list[Leaf]] = [[]]
    size = 0
    for leaf in leaves:
        added = int(np.prod(leaf.shape)) * dtypes[leaf.path].itemsize
        if shards[-1] and size + added > limit:
            shards.append([])
            size = 0
        shards[-1].append(leaf)
        size += added
    return shards


def _leaf(weight: Weight, path: str, transposed: bool) -> Leaf:
    def read() -> np.ndarray:
        found = weight.read()
        return np.ascontiguousarray(found.T) if transposed else found

    shape = weight.shape[::-1] if transposed else weight.shape
    return Leaf(path, shape, weight.dtype, read, weight.name)


def _named(weight: Weight) -> tuple[str, bool] | None:
    try:
        return hf.leaf_of(weight.name)
    except CheckpointError as error:
        raise CheckpointError(f"{weight.file}: {error}") from error


def _embedding(folder: pathlib.Path, weights: dict[str, Weight], tied: bool) -> Weight:
    """The table of both stacks, which files keep under one name or several."""
    names = [name for name in ("shared.weight", *hf.ALIASES) if name in weights]
    if not names and tied and "lm_head.weight" in weights:
        names = ["lm_head.weight"]  # a tied model saved with its output matrix alone
    if not names:
        raise CheckpointError(f"{folder} lacks shared.weight, the embedding.")
    table = weights[names[0]]
    if len(table.shape) != 2:
        raise CheckpointError(f"{table.file}: {table.name} has shape {table.shape}.")
    for name in names[1:]:
        if not hf_weights.equal(table, weights[name]):
            raise CheckpointError(
                f"{weights[name].file}: {name} differs from {table.name}; encoder and decoder "
                "share one embedding in a T5."
            )
    return table


def _output(
    folder: pathlib.Path,
    weights: dict[str, Weight],
    table: Weight,
    described: hf_config.Description,
) -> Weight | None:
    """The matrix of the logits, None if they come from the embedding or not at all."""
    head = weights.get("lm_head.weight")
    if not described.config.has_decoder:
        if head is not None:
            raise CheckpointError(f"{folder} is an encoder alone, but holds {head.name}.")
        return None
    if described.scaled_logits:
        if head is not None and head is not table and not hf_weights.equal(head, table):
            raise CheckpointError(
                f"{folder / CONFIG} says that logits come from the embedding "
                f"(tie_word_embeddings), but {head.file.name} holds another lm_head.weight. Set "
                "tie_word_embeddings to false if the model is a T5 1.1."
            )
        return None
    if head is None and not described.tied:
        raise CheckpointError(f"{folder} lacks lm_head.weight.")
    return table if head is None else head


def _write_json(path: pathlib.Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf8")

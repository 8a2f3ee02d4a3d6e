"""Writes Hugging Face folders of tiny T5s by hand."""

import json

import numpy as np
import safetensors.numpy
import small_t5

from variator_jax.store import hugging_face as hf
from variator_jax.store.backbone import Stream, memory_source

VOCABULARY = b"any SentencePiece model"


def state_dict(backbone):
    return {
        hf.name_of(path): np.ascontiguousarray(x.T) if hf.is_transposed(path) else x
        for path, x in small_t5.flat(backbone.params).items()
    }


def save_hf(path, backbone, **more):
    hf.write(path, Stream(memory_source(path, backbone)), **more)


def write(folder, state, **changes):
    folder.mkdir(exist_ok=True)
    config = {
        "architectures": ["T5ForConditionalGeneration"],
        "model_type": "t5",
        **dict(d_model=16, d_kv=4, d_ff=24, num_heads=3, num_layers=3, num_decoder_layers=2),
        "vocab_size": 40,  # resized afterwards: the weight's rows count
        **dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
        **changes,
    }
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(state, folder / "model.safetensors", {"format": "pt"})
    (folder / "spiece.model").write_bytes(VOCABULARY)
    return folder

"""Writes Hugging Face folders of tiny T5s by hand."""

import json

import numpy as np
import safetensors.numpy
import small_t5

from variator_jax.store import hugging_face as hf
from variator_jax.store.backbone import Stream, memory_source

VOCABULARY = b"any SentencePiece model"
LEFT_OUT = None, "left out"


def state_dict(backbone):
    return {
        hf.name_of(path): np.ascontiguousarray(x.T) if hf.is_transposed(path) else x
        for path, x in small_t5.flat(backbone.params).items()
    }


def save_hf(path, backbone, **more):
    hf.write(path, Stream(memory_source(path, backbone)), **more)


def write(folder, state, **changes):
    """`changes` are settings that take the place of others, or are `LEFT_OUT`."""
    folder.mkdir(exist_ok=True)
    config = dict(d_model=16, d_kv=4, d_ff=24, num_heads=3, num_layers=3, num_decoder_layers=2)
    config |= dict(model_type="t5", architectures=["T5ForConditionalGeneration"])
    config |= dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)
    config |= {"vocab_size": 40, **changes}  # resized afterwards: the weight's rows count
    config = {key: x for key, x in config.items() if x is not LEFT_OUT}
    (folder / "config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(state, folder / "model.safetensors", {"format": "pt"})
    (folder / "spiece.model").write_bytes(VOCABULARY)
    return folder

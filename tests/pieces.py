"""A small SentencePiece model; importing this imports TensorFlow."""

from sentencepiece import sentencepiece_model_pb2 as pb2

from variator_jax.data.vocabulary import train_sentencepiece


def pieces(own_sentinels=0):
    """The bytes of a model with so many sentinels among its pieces, as mT5's has them."""
    texts = ["the quick brown fox jumps over the lazy dog", "Is it a sentence? Yes, it is.", "no."]
    proto = pb2.ModelProto.FromString(train_sentencepiece(texts * 30, 120))
    for i in reversed(range(own_sentinels)):
        proto.pieces.add(piece=f"\u2581<extra_id_{i}>", score=0.0, type=4)
    return proto.SerializeToString()

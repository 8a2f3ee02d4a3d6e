"""What a T5 backbone costs: parameters and FLOPs, by formula. A multiply-add is 2 FLOPs."""

from variator_jax.backbones.t5.attention import NUM_BUCKETS
from variator_jax.backbones.t5.config import T5Config


def backbone_parameters(config: T5Config) -> int:
    """Number of weights of the whole backbone: embeddings, encoder, decoder, output projection."""
    embed, joined = config.embed_dim, config.num_heads * config.head_dim
    attention = 4 * embed * joined
    kernels = (len(config.mlp_activations) + 1) * embed
    position_bias = config.num_heads * NUM_BUCKETS
    # Per layer one norm for each sublayer; per stack one position bias and one final norm.
    layer = attention + kernels * config.encoder_mlp + 2 * embed
    encoder = config.num_encoder_layers * layer + position_bias + embed
    total = config.vocab_size * embed + encoder
    if config.has_decoder:
        layer = 2 * attention + kernels * config.mlp_dim + 3 * embed
        total += config.num_decoder_layers * layer + position_bias + embed
        total += 0 if config.logits_via_embedding else embed * config.vocab_size
    return total


def attention_flops(config: T5Config, queries: int, keys: int) -> int:
    """Projections, scores and weighted values of one layer and one row."""
    joined = config.num_heads * config.head_dim
    projections = (queries + keys) * 4 * config.embed_dim * joined
    return projections + 4 * queries * keys * joined


def ffn_flops(config: T5Config, rows: int) -> int:
    """One frozen FFN of the encoder on `rows` hidden vectors: 4DF each, 6DF if gated."""
    return rows * 2 * (len(config.mlp_activations) + 1) * config.embed_dim * config.encoder_mlp

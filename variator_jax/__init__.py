"""variator_jax: small trained compression plugins that make big frozen T5 encoders cheap."""

__version__ = "0.1.0"

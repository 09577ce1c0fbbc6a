"""DeepSeek-family models through Multi-head Latent Attention."""

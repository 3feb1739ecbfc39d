"""Methods that look at hidden states through a sparse autoencoder's latents."""

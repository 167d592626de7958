"""Autoencoders: an encoder, a decoder and a latent variable between them."""

from trilemma.autoencoder.vae import VAE
from trilemma.core.registry import register

register(
    "vae",
    VAE,
    family="autoencoder",
    paper="Kingma & Welling 2014, arXiv:1312.6114; Rezende et al. 2014, arXiv:1401.4082",
)

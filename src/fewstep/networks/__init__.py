"""Networks that are no teachers: adapters, discriminator, VAE, text encoders, perceptual and feature networks."""

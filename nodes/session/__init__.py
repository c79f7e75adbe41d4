"""What the pack remembers between the host's calls: of a sampling run, and of a LATENT's video."""

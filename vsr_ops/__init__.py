"""Diffusion video super-resolution, free of any host: tiles, propagation, guidance, colour, video, weights."""

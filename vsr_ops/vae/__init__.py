"""Between pictures and latents, in flat memory: encoding, and exact decoding tile by tile."""

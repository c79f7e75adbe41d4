"""What acts on a denoiser: tiles, attention with added keys, SAP and TAP, guidance (DC-VSR); alignment (SDATC)."""

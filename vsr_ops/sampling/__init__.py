"""DC-VSR on a denoiser: tiles, attention with added keys, SAP and TAP, guidance, alignment along a flow."""

"""What is trained on: photographs, videos, degradations, latents."""

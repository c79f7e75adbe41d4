"""The UNets that sample, as diffusers has them: Stable Video Diffusion and Stable Diffusion."""

"""Optical flow: warping along it, and estimating it."""

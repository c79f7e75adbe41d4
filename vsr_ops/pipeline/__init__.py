"""The main job without a host: a video in, a larger video out."""

"""Recipes that train the pack's own weights from folders of pictures and videos."""

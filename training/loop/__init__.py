"""Any training run: the loop, its recipe, its state, its folder."""

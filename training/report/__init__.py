"""How trained weights do, on clips kept out of training."""

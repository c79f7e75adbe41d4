"""Files of weights: read safely, written whole, and names translated between projects."""

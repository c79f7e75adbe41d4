"""Pictures for people to look at: comparisons, plans of tiles, flow, charts."""

"""How good a result is: one table of metrics, and reports over folders of clips."""

"""Questions about trained models, each answered by a figure and a table."""

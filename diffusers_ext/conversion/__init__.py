"""Checkpoints of other projects as pipelines of this package."""

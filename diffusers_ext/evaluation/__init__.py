"""Measuring a pipeline: real images, generated images, and the figures that compare them."""

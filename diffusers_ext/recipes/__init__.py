"""The parts of the training scripts: networks, objectives, pictures."""

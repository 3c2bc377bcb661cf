"""After the training: what is measured of a model becomes what its pipeline does by default."""

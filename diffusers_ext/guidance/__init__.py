"""How several predictions of a network become one, from labels and from texts."""

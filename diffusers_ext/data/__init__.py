"""From a data set as the user names it to batches of pixels."""

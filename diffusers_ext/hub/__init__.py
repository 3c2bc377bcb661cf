"""From a finished run to the Hub: the model card, the saved folder, the push."""

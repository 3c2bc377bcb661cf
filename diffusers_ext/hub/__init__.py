"""What a finished run shows and shares: the card, the saved folder, the push."""

"""What each training script is made of: networks, objectives, pictures."""

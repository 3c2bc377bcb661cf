"""The Gaussian noising path: levels, steps, losses, likelihood. Every formula of the package stands here once."""

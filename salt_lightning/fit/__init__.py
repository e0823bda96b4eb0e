"""What a fit needs besides the model: optimizer, cadence, measurement and checks."""

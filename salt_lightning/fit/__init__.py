"""What a fit does beside the model: optimizer, cadence, measurement, and what it refuses."""

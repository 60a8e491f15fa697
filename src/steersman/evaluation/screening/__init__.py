"""Screening: which experts cause a behaviour, by the effect of each on what the model would answer."""

"""The embedded model and the scenes it was trained on."""

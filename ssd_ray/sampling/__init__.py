"""Random draws, logit processing and the verification rule."""

"""What to speculate on, how widely, and what to do on a miss."""

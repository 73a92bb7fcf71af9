"""What ``ssd-ray bench`` runs."""

"""What the commands of `python -m helpers` do."""

"""Makers of what is stored in assets, and of measurements; nothing else imports them."""

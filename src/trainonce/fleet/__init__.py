"""Trouble seen early: health signals, clock synchronisation, link localisation, stragglers."""

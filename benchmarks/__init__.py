"""Measurements, each side by side with what it is compared to; `make bench` takes them all."""

"""Operators over whole parameters: norms, masked and sparse updates, spectra."""

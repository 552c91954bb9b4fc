"""Regularizers, in folders by what they act on."""

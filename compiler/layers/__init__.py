"""Kinds of layers whose per-example gradient norms can be measured, one file each."""

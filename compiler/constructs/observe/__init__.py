"""Observers: measurements that do not change training."""

"""Observers: measurements that change nothing."""

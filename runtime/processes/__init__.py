"""Processes that run one program together: what replicas send each other, and parameters sharded over processes."""

"""Aggregators: many updates become one."""

"""Demonstrations behind `jaxtune quickstart` and `jaxtune plan --table`."""

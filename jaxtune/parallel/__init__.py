"""Devices and processes: mesh, sharding rules, set-up and failures of several processes."""

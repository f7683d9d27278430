"""Devices and hosts: the mesh, where arrays lie on it, and how processes find each other."""

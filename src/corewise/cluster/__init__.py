"""Bulk jobs: the same job on this machine, or on the nodes of a Ray cluster. The only room that imports Ray."""

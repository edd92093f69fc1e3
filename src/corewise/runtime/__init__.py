"""Payloads at work: the trial process and its client, instances, measuring, races and loads."""

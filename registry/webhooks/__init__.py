"""Telling others that a job has ended."""

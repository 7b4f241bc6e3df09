"""The published systems that presets are of.

This file makes the folder a regular package: no other one called presets comes first.
"""

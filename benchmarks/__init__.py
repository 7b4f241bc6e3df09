"""Benchmarks of train_gpt.py.

This file makes the folder a regular package: no other one called benchmarks comes first.
"""

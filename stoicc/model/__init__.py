"""Whole models: recipes, calibration layer by layer, compression of every layer, reports and files."""

"""What is measured, how, and the results on record (`bench/results/`)."""

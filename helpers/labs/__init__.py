"""What serves one notebook each: the broken runs of 10, the learning-rate runs of 06."""

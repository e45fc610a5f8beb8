"""What serves one notebook each: the broken runs and questions of 10, the learning-rate runs of 06."""

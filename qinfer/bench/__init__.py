"""`python -m qinfer.bench`: measurements, each beside the ceiling of the device that it ran on."""

"""What every other package stands on: batches, parameter paths, devices, checks of arguments."""

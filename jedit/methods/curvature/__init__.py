"""Methods that take steps in the metric of a curvature."""

"""The study of the method on the demo model, how well the planner's estimates hold, and planning at full size."""

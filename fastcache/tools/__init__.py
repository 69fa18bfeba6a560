"""What is used around runs: measuring, inspecting, splitting batches."""

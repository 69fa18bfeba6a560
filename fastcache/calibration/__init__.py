"""What a calibrating run has measured, as an object and as a file."""

"""What all packages share; imports nothing heavy."""

"""What runs forward, backward and update."""

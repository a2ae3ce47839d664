"""What every job stands on, whatever it trains: its processes, files and settings."""
